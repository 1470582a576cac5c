"""What happened to the members between two looks, as events. Decides nothing."""

from __future__ import annotations

from typing import Any

from geomirror.tunnel.membership import Membership

Event = tuple[str, dict[str, Any]]


class Roster:
    """The members as they were last seen."""

    def __init__(self, membership: Membership) -> None:
        self._names = _names(membership)

    def changes(self, membership: Membership) -> list[Event]:
        """Events since the last look, by node id; whoever is new is told where it joined."""
        before, self._names = self._names, _names(membership)
        gone = {item.node_id: item for item in membership.revocations.revoked}
        found: list[Event] = []
        for node_id, name in sorted(before.items()):
            now = self._names.get(node_id)
            if now is None:
                has_left = node_id in gone and gone[node_id].is_left
                found.append(("node_left" if has_left else "node_revoked", {"peer": name}))
            elif now != name:
                found.append(("node_renamed", {"peer": now, "old_name": name}))
        return found


def _names(membership: Membership) -> dict[str, str]:
    return {member.node_id: member.name for member in membership.active()}
