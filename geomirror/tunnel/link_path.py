"""How a peer is reached: the text forms of paths, and which is better.

| rank | kind | text |
| --- | --- | --- |
| 0 | `direct` | `HOST:PORT` |
| 1 | `proxy` | `HOST:PORT via PROXY:PORT` |
| 2 | `websocket` | `wss://HOST[:PORT]/PATH` (or `ws://`) |
| 3 | `websocket_proxy` | `wss://HOST[:PORT]/PATH via PROXY:PORT` |

A lower rank has fewer parties and copies on the way. What is carried is the same on all of them:
mutual TLS between the two nodes. The text is what links, circuits, logs and `link list` use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from geomirror.errors import ConfigError, GeomirrorError
from geomirror.tunnel.names import join_endpoint, split_endpoint

KINDS = ("direct", "proxy", "websocket", "websocket_proxy")
WORDS = (
    "direct TLS",
    "TLS through a proxy",
    "WebSocket",
    "WebSocket through a proxy",
)
RANK_MAX = len(KINDS) - 1
URL_LENGTH_MAX = 256

_PORTS = {"ws": 80, "wss": 443}
_VIA = " via "
_URL = re.compile(
    r"(wss?)://(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"(?::([0-9]{1,5}))?(/[A-Za-z0-9._~/-]*)?\Z",
    re.ASCII,
)


@dataclass(frozen=True)
class LinkPath:
    """One path, taken apart."""

    host: str
    """Without brackets."""
    port: int
    scheme: str = ""
    """`ws`, `wss`, or empty: no WebSocket."""
    resource: str = ""
    """Path of the URL."""
    proxy: str = ""
    """`HOST:PORT`, or empty."""

    @property
    def target(self) -> str:
        """`HOST:PORT` that a proxy is asked for."""
        return join_endpoint(self.host, self.port)

    @property
    def http_host(self) -> str:
        """The `Host` of a request."""
        if self.port == _PORTS.get(self.scheme):
            return f"[{self.host}]" if ":" in self.host else self.host
        return self.target


def is_url(text: str) -> bool:
    """Whether an endpoint is a WebSocket."""
    return "://" in text


def parse_path(text: str, *, error: type[GeomirrorError] = ConfigError) -> LinkPath:
    """Take a path apart. :raises GeomirrorError: `error`: it is none."""
    base, _, proxy = text.partition(_VIA)
    if proxy:
        split_endpoint(proxy, error=error)
    if not is_url(base):
        return LinkPath(*split_endpoint(base, error=error), proxy=proxy)
    found = _URL.match(base) if len(base) <= URL_LENGTH_MAX else None
    if found is None or int(found.group(3) or 0) > 65535:
        raise error(
            "a WebSocket endpoint is wss://HOST[:PORT]/PATH", hint='like "wss://gm.example/link"'
        )
    scheme, host, port, resource = found.groups()
    number = int(port) if port is not None else _PORTS[scheme]
    return LinkPath(host.strip("[]"), number, scheme, resource or "/", proxy)


def rank_of(text: str) -> int:
    """The rank of a path in its text form; 0 is the best."""
    return 2 * is_url(text) + (_VIA in text)


def expand_paths(endpoints: Iterable[str], proxy: str | None) -> list[str]:
    """All paths to a peer's endpoints, best first; in each rank in the order given.

    :param proxy: `HOST:PORT` of the HTTP proxy that this node may use, if any.
    """
    found = list(endpoints)
    if proxy is not None:
        found += [f"{endpoint}{_VIA}{proxy}" for endpoint in found]
    return sorted(found, key=rank_of)
