"""How long writers wait for disk space before they are told."""

from __future__ import annotations

from geomirror.environment import SECOND
from geomirror.errors import NoSpaceError
from geomirror.node.full_disk import QUIET_NS, FullDisk

CAUSE = NoSpaceError("write /x: No space left on device")


def test_writers_wait_then_are_told_until_there_is_space():
    disk = FullDisk(30 * SECOND)
    assert disk.look(None, 0) is None
    for second in range(100, 130):
        assert disk.look(CAUSE, second * SECOND) is None
    assert disk.look(CAUSE, 130 * SECOND) is CAUSE
    # A retry looks good for an instant; the wait does not begin anew by that.
    assert disk.look(None, 131 * SECOND) is None
    assert disk.look(CAUSE, 132 * SECOND) is CAUSE
    assert disk.look(None, 132 * SECOND + QUIET_NS) is None
    # The next time they wait again.
    assert disk.look(CAUSE, 200 * SECOND) is None
    assert disk.look(CAUSE, 229 * SECOND) is None
    assert disk.look(CAUSE, 230 * SECOND) is CAUSE


def test_a_wait_of_zero_tells_at_once():
    assert FullDisk(0).look(CAUSE, 7) is CAUSE
