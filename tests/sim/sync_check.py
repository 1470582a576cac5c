"""What a flush promises under a synchronous policy, checked against what the mirrors said.

A flush is answered when enough mirrors have said that they have what it covers. A mirror that had
not is out of sync, and every later life of the primary knows that, until it was at zero lag again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from geomirror.environment import SECOND
from geomirror.volume.superblock import PeerRecord
from geomirror.wan_protocol.messages import Acknowledge, SessionAccept
from geomirror.wan_protocol.sync_policy import ASYNCHRONOUS, LEVELS, RECEIVED, SyncPolicy
from tests.sim.oracle import Oracle, OracleError


def draw_policy(chance: random.Random, names: list[str]) -> SyncPolicy:
    """Of a run, or a part of it; half of them are asynchronous."""
    if chance.random() < 0.5:
        return ASYNCHRONOUS
    peers = chance.sample(names, chance.randrange(1, len(names) + 1))
    acks = {name: chance.choice(LEVELS[1:]) for name in sorted(peers)}
    copies = chance.choice([None, None, 1])
    after_ns = None if chance.random() < 0.4 else int(chance.uniform(0, 6) * SECOND)
    return SyncPolicy(acks, copies, after_ns)


@dataclass
class _Line:
    """Of one history, which has one primary."""

    reported: dict[str, dict[str, int]] = field(default_factory=dict)
    """Mirror → level → highest epoch that it ever reported."""
    left_out: set[str] = field(default_factory=set)


@dataclass
class SyncCheck:
    """Keeps what mirrors said, and who was left out."""

    policy: SyncPolicy
    """What the operator asked for last."""
    checks: int = 0
    _lines: dict[str, _Line] = field(default_factory=dict)

    def policy_at(self, name: str) -> SyncPolicy:
        """The settings as a primary of this name takes them: it waits for others only."""
        policy = self.policy
        if name not in policy.acks:
            return policy
        acks = {peer: level for peer, level in policy.acks.items() if peer != name}
        copies = None if policy.copies is None or policy.copies > len(acks) else policy.copies
        return SyncPolicy(acks, copies, policy.degrade_after_ns) if acks else ASYNCHRONOUS

    def _of(self, oracle: Oracle) -> _Line:
        return self._lines.setdefault(oracle.key, _Line())

    def fork(self, oracle: Oracle, twin: Oracle) -> None:
        """A history may go on in another way from here."""
        self._lines[twin.key] = copy.deepcopy(self._of(oracle))

    def report(self, oracle: Oracle, name: str, message: object) -> None:
        """A mirror on this history sends this."""
        if not isinstance(message, (Acknowledge, SessionAccept)):
            return
        levels = self._of(oracle).reported.setdefault(name, dict.fromkeys(LEVELS, 0))
        if isinstance(message, (Acknowledge, SessionAccept)):
            levels["durable"] = max(levels["durable"], message.durable_epoch)
            levels["applied"] = max(levels["applied"], message.applied_epoch)
            levels[RECEIVED] = max(levels[RECEIVED], levels["durable"])
        if isinstance(message, Acknowledge):
            levels[RECEIVED] = max(levels[RECEIVED], message.received_epoch)

    def answered(
        self, oracle: Oracle, position: int, sealed_epoch: int, policy: SyncPolicy
    ) -> None:
        """A flush that covers so many operations was answered with success under these rules."""
        acks = policy.acks
        if not acks:
            return
        prefixes, line = oracle.epoch_prefix, self._of(oracle)
        epoch = min((e for e, count in prefixes.items() if count >= position), default=None)
        if epoch is None or epoch > sealed_epoch:
            raise OracleError("a synchronous flush was answered before its epoch was sealed")
        lacking = [
            name
            for name, level in acks.items()
            if line.reported.get(name, {}).get(level, 0) < epoch
        ]
        held = len(acks) - len(lacking)
        self.checks += 1
        if held >= (policy.copies or len(acks)):
            return
        if policy.degrade_after_ns is None:
            raise OracleError(f"epoch {epoch} is not at {', '.join(lacking)}, a flush was answered")
        line.left_out.update(lacking)

    def restored(self, oracle: Oracle, name: str) -> None:
        """The primary says that a mirror is in sync again."""
        self._of(oracle).left_out.discard(name)

    def recovered(self, oracle: Oracle, peers: Mapping[str, PeerRecord]) -> None:
        """The primary came back with these records."""
        for name in sorted(self._of(oracle).left_out):
            if peers[name].in_sync:
                raise OracleError(f"{name} counts as in sync; a flush was answered without it")
