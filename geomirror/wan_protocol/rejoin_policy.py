"""Whether a member gives up its tail by itself when it hears of a history with a higher token.

| setting       | values      | default |
| ------------- | ----------- | ------- |
| `auto_rejoin` | `on`, `off` | `off`   |

The tail is durable as a branch first, always; without room for it the member stops and asks.
"""

from __future__ import annotations

from collections.abc import Mapping

from geomirror.errors import UsageError

AUTO_REJOIN = "auto_rejoin"
_VALUES = ("on", "off")


def check_auto_rejoin(value: str) -> None:
    """Refuse what is no value of the setting. :raises UsageError: it is none."""
    if value not in _VALUES:
        raise UsageError(f"{AUTO_REJOIN}: {value!r} is none of {', '.join(_VALUES)}")


def is_automatic(settings: Mapping[str, str]) -> bool:
    """Whether a resource's settings let a member with a tail come back by itself."""
    return settings.get(AUTO_REJOIN) == "on"
