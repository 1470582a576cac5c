"""The passes of a history that has a point in each step of each level, as tests want them, too."""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.environment import SECOND
from geomirror.limits import PRODUCTION
from geomirror.volume.undo_file import PassLabel
from geomirror.volume.undo_levels import Level

HOUR_S = 3600


def full_labels(
    levels: Sequence[Level], generation: bytes, now_ns: int, more_hours: int = 0
) -> list[PassLabel]:
    """One pass in each step of each level, and each epoch of what is not settled, oldest first.

    :param more_hours: so many more at the old end, an hour each.
    """
    epoch_ns, start_ns = PRODUCTION.epoch_age_ns, PRODUCTION.undo_settled_ns
    ages = list(range(0, start_ns, epoch_ns))
    for step_ns, age_ns in levels:
        ages += range(start_ns, age_ns, step_ns)
        start_ns = age_ns
    hour_ns = HOUR_S * SECOND
    ages += range(start_ns, start_ns + more_hours * hour_ns, hour_ns)
    found, epoch = [], 0
    for age, older in zip(reversed(ages), [None, *reversed(ages)], strict=False):
        span = 1 if older is None else (older - age) // epoch_ns
        found.append(PassLabel(generation, epoch, epoch + span, now_ns - age, bytes(32)))
        epoch += span
    return found
