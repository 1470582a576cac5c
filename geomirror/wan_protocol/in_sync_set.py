"""Who holds everything that is confirmed: the in-sync set of a primary, and the rules in force.

```
 at zero lag ─▶ in sync ── kept a flush waiting for `degrade_after` ──▶ left out ─▶ at zero lag …
 a change of the set or of the rules ─▶ version + 1 ─▶ superblock ─▶ the members (peer_standings)
```
Invariants: a peer is taken in only when it has every epoch that holds a confirmed write; who is
left out, and the rules, are durable before a flush is answered by them; rules that members rely on
(`block`) are given up only after all of the in-sync members know it (I15).
Deliberately not here: how flushes wait (`peer_flushes`), what settings mean (`sync_policy`).
"""

from __future__ import annotations

from typing import Any

from geomirror.cluster.standing import BLOCK_NS, LeftOut
from geomirror.environment import SECOND
from geomirror.limits import Limits
from geomirror.volume.engine import Engine
from geomirror.volume.superblock import SyncRecord
from geomirror.wan_protocol.decisions import Emit
from geomirror.wan_protocol.messages import SessionAccept
from geomirror.wan_protocol.peer_modes import PeerModes
from geomirror.wan_protocol.sender import FOLD, STREAM, Sender
from geomirror.wan_protocol.sync_policy import APPLIED, RECEIVED, SyncPolicy


def policy_of(record: SyncRecord) -> SyncPolicy:
    """The rules that a superblock has."""
    after_ns = None if record.degrade_after_ns == BLOCK_NS else record.degrade_after_ns
    return SyncPolicy(dict(record.acks), record.copies or None, after_ns)


class InSyncSet(PeerModes):
    """The part of the primary that knows who has everything confirmed."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        super().__init__(engine, limits)
        superblock = engine.superblock
        record = superblock.sync
        self.policy: SyncPolicy = policy_of(record)
        """In force now."""
        self.wanted_policy: SyncPolicy = self.policy
        """In force as soon as the members know that the present one is given up."""
        self.confirmed_epoch = max(engine.committed_epoch, engine.last_changed_epoch)
        """Every write that a flush has answered lies in epochs up to this one. At a start: all that
        was recovered, since nobody knows what of it was answered."""
        self._is_binding = record.is_binding
        self._version = record.version + 1
        """Of rules and set in memory; another one in each life, so that no two are confused."""
        self._weakened_version = self._version
        """Members that can be told know this version before another flush is answered."""
        peers = superblock.peers
        self._in_sync = {name for name, peer in peers.items() if peer.in_sync}
        self._left = {
            name: LeftOut(peer.left_epoch, peer.left_wall_ns)
            for name, peer in peers.items()
            if peer.left_wall_ns
        }
        self._relied = {name for name, peer in peers.items() if peer.is_relied}
        self._in_sync_saved = set(self._in_sync)
        """As the superblock on disk has it; likewise the rules."""
        self._saved = record
        self._left_saved = dict(self._left)

    @property
    def wall_ns(self) -> int:
        """The wall clock now, as far as this core was told."""
        raise NotImplementedError

    def _all_know(self, version: int) -> bool:
        """Whether every in-sync member has this version, or a later one, durable."""
        raise NotImplementedError

    # The rules.

    def set_policy(self, policy: SyncPolicy, now_ns: int, *, is_forced: bool = False) -> None:
        """Take over settings. Flushes that wait are judged by them once they are in force.

        That is at once, unless members rely on the present ones: with `block` a member that is away
        knows that nothing is confirmed without it, so it has to hear first that this ends.

        :param is_forced: do not wait for members; what those that are away say of themselves may
            be wrong then.
        """
        self.now_ns = max(self.now_ns, now_ns)
        self.wanted_policy = policy
        if policy == self.policy:
            if policy.is_blocking and not self._is_binding:
                self._is_binding = True  # It was about to be given up.
                self._set_changed()
        elif is_forced or not self._relied_on():
            self._take_rules()
        elif self._is_binding:
            self._is_binding = False
            self._set_changed(is_weaker=True)
        self._pump()

    def _relied_on(self) -> set[str]:
        """Members that may have been told that nothing is confirmed against these rules."""
        return self._relied & set(self.senders)

    @property
    def pending_policy(self) -> SyncPolicy | None:
        """Settings that wait for members to know that the present ones end."""
        return None if self.wanted_policy == self.policy else self.wanted_policy

    def _take_rules(self) -> None:
        self.policy = self.wanted_policy
        self._is_binding = self.policy.is_blocking
        self._relied.clear()
        for name in [name for name in self._left if name not in self.policy.acks]:
            del self._left[name]
        self._keep_complete()

    def _pump_rules(self) -> None:
        if self.pending_policy is not None and self._all_know(self._weakened_version):
            self._take_rules()

    def _keep_complete(self) -> None:
        """Other rules count other copies: only who has everything confirmed stays in the set."""
        for name in sorted(self._in_sync):
            sender = self.senders.get(name)
            is_complete = sender is not None and self._reached(sender) >= self.confirmed_epoch
            if name not in self.policy.acks:
                self._in_sync.discard(name)
            elif not is_complete:
                self._leave_out(name, self.confirmed_epoch)
        self._set_changed(is_weaker=True)

    # The set.

    def is_in_sync(self, peer: str) -> bool:
        """Whether no flush was answered without this synchronous peer since it was at zero lag."""
        return peer in self._in_sync

    @property
    def out_of_sync(self) -> list[str]:
        """Synchronous peers that flushes do not wait for now."""
        return sorted(set(self.policy.acks) - self._in_sync)

    def _reached(self, sender: Sender) -> int:
        """Epoch that a peer has at the level of the policy; -1 without a consistent image, as in
        a resync and until what follows it is applied."""
        is_streamed = sender.mode in (STREAM, FOLD) and sender.name not in self.bitmaps
        if not is_streamed or sender.data_state != "consistent":
            return -1
        match self.policy.level(sender.name):
            case level if level == RECEIVED:
                return sender.received_epoch
            case level if level == APPLIED:
                return sender.applied_epoch
            case _:
                return sender.durable_epoch

    def _rejoin(self) -> None:
        least = max(self.engine.sealed_epoch, self.confirmed_epoch)
        for name in self.out_of_sync:
            sender = self.senders.get(name)
            if sender is None or not sender.is_open or sender.is_paused:
                continue
            if self._reached(sender) >= least:
                self._in_sync.add(name)
                self._left.pop(name, None)
                self._set_changed()
                self._decide(Emit("sync_restored", {"peer": name, "epoch": sender.durable_epoch}))

    def _leave_out(self, name: str, epoch: int) -> None:
        """Flushes may be answered without this peer, once that is durable."""
        self._in_sync.discard(name)
        self._left[name] = LeftOut(epoch, self.wall_ns)
        self._set_changed(is_weaker=True)
        after_ns = self.policy.degrade_after_ns
        fields: dict[str, object] = {"peer": name, "epoch": epoch}
        if after_ns is not None:
            fields["after_seconds"] = after_ns / SECOND
        self._decide(Emit("sync_degraded", fields))

    def _compare_word(self, sender: Sender, message: SessionAccept) -> None:
        """Notice a peer that has less than it once said to be durable: what counted on it does not
        hold any more. It is sent all the same: what it has is on this history."""
        if message.durable_epoch >= sender.said_epoch:
            return
        sender.gone_back_from, sender.said_epoch = sender.said_epoch, message.durable_epoch
        fields: dict[str, object] = {"peer": sender.name, "epoch": message.durable_epoch}
        self._decide(Emit("peer_gone_back", {**fields, "from_epoch": sender.gone_back_from}))
        if sender.name in self._in_sync:
            self._leave_out(sender.name, message.durable_epoch + 1)

    def _set_changed(self, *, is_weaker: bool = False) -> None:
        self._version += 1
        if is_weaker:
            self._weakened_version = self._version
        self._checkpoint_wanted = True

    def remove_peer(self, name: str) -> None:
        """Forget the peer; no flush waits for it any more."""
        if name in self.policy.acks:
            acks = {peer: level for peer, level in self.policy.acks.items() if peer != name}
            policy = SyncPolicy(acks, self.policy.copies, self.policy.degrade_after_ns)
            self._in_sync.discard(name)
            self._in_sync_saved.discard(name)
            self._left.pop(name, None)
            self._relied.discard(name)
            if self.wanted_policy == self.policy:
                self.wanted_policy = policy
            self.policy = policy
            self._keep_complete()
        super().remove_peer(name)

    # Persistence.

    def _checkpoint_records(self) -> None:
        super()._checkpoint_records()
        superblock, policy = self.engine.superblock, self.policy
        if self._is_binding:
            self._relied |= self._in_sync  # They are told once this is durable.
        for name, record in superblock.peers.items():
            left = self._left.get(name)
            record.in_sync, record.is_relied = name in self._in_sync, name in self._relied
            record.left_epoch, record.left_wall_ns = (left.epoch, left.wall_ns) if left else (0, 0)
        after_ns = BLOCK_NS if policy.degrade_after_ns is None else policy.degrade_after_ns
        superblock.sync = SyncRecord(
            self._version, dict(policy.acks), policy.copies or 0, after_ns, self._is_binding
        )

    def _checkpoint_done(self, job: Any) -> None:
        peers = job.superblock.peers
        self._in_sync_saved = {name for name, record in peers.items() if record.in_sync}
        self._left_saved = {
            name: LeftOut(record.left_epoch, record.left_wall_ns)
            for name, record in peers.items()
            if record.left_wall_ns
        }
        self._saved = job.superblock.sync
        super()._checkpoint_done(job)
