"""Who holds everything that is confirmed: the `sync` object of `status --json`.

At the primary as it is now; at a secondary as the primary said it last. The words are those of
`docs/cli.md`: `mode` asynchronous, degrade, block · a member is in sync or out of sync.
"""

from __future__ import annotations

from typing import Any

from geomirror.cluster.standing import BLOCK_NS, Standing
from geomirror.node.rfc3339 import rfc3339
from geomirror.wan_protocol.primary import Primary
from geomirror.wan_protocol.secondary import Secondary


def sync_object(core: Primary | Secondary) -> dict[str, Any] | None:
    """Rules and in-sync set; None at a secondary that never heard them."""
    if isinstance(core, Secondary):
        return None if core.standing is None else standing_object(core.standing)
    waits_for = core.unaware
    pending = None if core.pending_policy is None else {"waits_for": waits_for}
    return {**standing_object(core.standing()), "pending": pending}


def standing_object(standing: Standing) -> dict[str, Any]:
    """One standing."""
    out = []
    for node in sorted(set(standing.acks) - set(standing.in_sync)):
        left = standing.left_out.get(node)
        since = None if left is None else rfc3339(left.wall_ns)
        out.append({"node": node, "epoch": None if left is None else left.epoch, "since": since})
    return {
        "mode": mode_of(standing),
        "copies": standing.copies or None,
        "in_sync": sorted(standing.in_sync),
        "out_of_sync": out,
        "confirmed_epoch": standing.confirmed_epoch,
        "version": standing.version,
        "as_of": rfc3339(standing.wall_ns),
        "pending": None,
    }


def mode_of(standing: Standing) -> str:
    """`asynchronous`, `degrade` or `block`."""
    if not standing.acks:
        return "asynchronous"
    return "block" if standing.degrade_after_ns == BLOCK_NS else "degrade"
