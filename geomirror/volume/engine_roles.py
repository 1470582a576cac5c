"""Changes of a resource's role on this node, each with one superblock write as its commit point.

```
 secondary, sealed = e ───────────promote──▶ primary: chain + (generation, e, H(e)), epoch e+1 next
 primary, everything sealed      ──demote───▶ secondary: same chain
 primary that heard a higher token ─supersede▶ primary that says so, and serves nothing
 that, or a secondary that said so ─rejoin───▶ secondary with the chain that it heard of
                                   ─promote──▶ primary: its own chain, a token above both
```
Invariants: readers see the last durable epoch from the moment at which a node becomes a primary,
whether or not its images hold it (`engine_layers`); no change is in the open epoch when a primary
becomes a secondary.
Until the job that is returned has run the disk has the role before; nothing is served meanwhile.
Deliberately not here: who decides it (`node.role_change`), what peers are told.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from geomirror.volume.engine_jobs import CheckpointJob
from geomirror.volume.engine_return import ReturningPrimary
from geomirror.volume.generations import ChainEntry, chain_records
from geomirror.volume.open_epoch import OpenEpoch
from geomirror.volume.superblock import GenerationRecord, PeerRecord, StartRecord, SyncRecord


class RoleChanges(ReturningPrimary):
    """The part of `Engine` that changes sides."""

    @property
    def is_still(self) -> bool:
        """Everything durable is in the images, nothing else is on its way: a role may change."""
        is_applied = self.applied_epoch == self.sealed_epoch == self.committed_epoch
        is_still = is_applied and self._draft is None and not self._open_entries
        return is_still and not self.is_returning

    @property
    def has_growth_to_apply(self) -> bool:
        """A volume has grown in an epoch that no image holds yet: that has to be applied first."""
        return bool(self.sizes.between(self.applied_epoch, self.committed_epoch))

    def next_generation(
        self, identity: bytes, reason: str, by: str, wall_ns: int
    ) -> GenerationRecord:
        """The generation that a promotion of this copy begins, at its durable epoch; its token is
        above all that were seen here."""
        chain, seen = self.superblock.chain, self.superblock.superseded_by
        reached = [g for g in chain if g.parent_epoch <= self.sealed_epoch] or chain
        return GenerationRecord(
            identity.hex(),
            max((g.token for g in (*chain, *seen)), default=0) + 1,
            parent=reached[-1].identity if reached else "",
            parent_epoch=self.sealed_epoch,
            parent_hash=self.sealed_hash.hex(),
            reason=reason,
            by=by,
            wall_ns=wall_ns,
        )

    def promote(self, generation: GenerationRecord, peers: Iterable[str]) -> CheckpointJob:
        """Become the primary of a new generation. Uncommitted spooled contents are forgotten, and
        so is any history that outranked this one.

        :param generation: from `next_generation`; it begins at the sealed epoch.
        :param peers: the other members; their epochs are kept from where this copy has them.
        :returns: a job; its `run` is the commit point. Complete it with `complete_checkpoint`.

        What no image holds yet readers see in the journal; passes go on with it.
        """
        superblock = self.superblock
        assert superblock.role == "secondary" or superblock.superseded_by
        assert superblock.data_state == "consistent"
        assert self.sealed_epoch == self.committed_epoch
        assert self._draft is None
        assert not self._open_entries
        assert not self.has_growth_to_apply
        assert generation.parent_epoch == self.sealed_epoch
        self._spooled.clear()
        start = self._history_start()
        # Epochs that this copy adopted the generation of, but never had, are not its history.
        chain = [g for g in superblock.chain if g.parent_epoch <= self.sealed_epoch]
        superblock.chain = [*chain, generation]
        self.marks.leave_others(superblock)
        superblock.role = "primary"
        superblock.superseded_by, superblock.superseded_starts = [], []
        superblock.consistent_from = -1
        superblock.sync = SyncRecord()
        # LSNs are those of this journal from here on.
        superblock.applied_end_lsn = self.journal.end_lsn
        rows = self._directory.after(self.applied_epoch)
        self._directory.drop_after(self.applied_epoch)
        for row in rows:
            self._directory.append(row._replace(end_lsn=self.journal.end_lsn))
        if rows:
            self.lay_unapplied()
        self._open = OpenEpoch(self.sealed_epoch + 1, self.journal.end_lsn, self.journal.end_lsn)
        self._keep_for(peers, *start)
        return self._checkpoint()

    def demote(self, peers: Iterable[str]) -> CheckpointJob:
        """Become a secondary; see `promote`. The journal keeps what it has for the other members,
        one of which will be the primary."""
        assert self.superblock.role == "primary"
        assert self.is_still
        return self._follow(peers)

    def rejoin(self, chain: Sequence[ChainEntry], peers: Iterable[str]) -> CheckpointJob:
        """Follow the history with this chain, which what is here is a part of; see `demote`."""
        assert self.superblock.superseded_by
        assert self.is_still
        self.adopt_chain(chain)
        return self._follow(peers)

    def _follow(self, peers: Iterable[str]) -> CheckpointJob:
        superblock, start = self.superblock, self._history_start()
        superblock.role = "secondary"
        superblock.sync = SyncRecord()
        superblock.superseded_by, superblock.superseded_starts = [], []
        self._spooled.clear()
        self._keep_for(peers, *start)
        return self._checkpoint()

    def supersede(
        self, chain: Sequence[ChainEntry], starts: Sequence[StartRecord] = ()
    ) -> CheckpointJob | None:
        """Remember durably that a chain with a higher token exists, and the starts of its history
        as far as they are known: nothing is accepted any more.

        Nothing is given up: the tail stays as it is. None: it is known already.
        """
        assert self.superblock.role == "primary"
        self.superblock.superseded_by = chain_records(chain)
        self.superblock.superseded_starts = list(starts)
        return self.checkpoint_job()

    def bytes_recorded(self, epoch: int) -> int:
        """As `bytes_backlog`, but of records alone: what there is to send. A restart leaves up to a
        whole segment unused, which takes room and nothing else."""
        floor = self._directory.floor_after(epoch)
        if floor is None:
            return 0
        return max(0, self.journal.end_lsn - floor - self.journal.void_bytes(floor))

    def keep_history(self, peers: Iterable[str], bytes_max: int) -> None:
        """At a secondary: keep the newest epochs, as far as they take no more than `bytes_max` of
        the journal, for the other members, which need them should this copy be promoted.

        Takes effect with the next checkpoint.
        """
        assert self.superblock.role == "secondary"
        epoch, chain_hash = self._history_start()
        if self.bytes_backlog(epoch) > bytes_max:
            numbers = [n for n in self._directory.numbers() if epoch < n <= self.applied_epoch]
            at = bisect_left(numbers, True, key=lambda n: self.bytes_backlog(n) <= bytes_max)
            epoch, chain_hash = self.applied_epoch, self.applied_hash
            if at < len(numbers):
                epoch, chain_hash = numbers[at], self._directory.info(numbers[at]).chain_hash
        self._keep_for(peers, epoch, chain_hash)

    def _history_start(self) -> tuple[int, bytes]:
        """An early epoch whose hash is known and after which the journal has everything."""
        first = self._directory.first_after(0)
        if first is None or first.first_number > self.applied_epoch:
            return self.applied_epoch, self.applied_hash
        if first.first_number == 1:
            return 0, bytes(32)
        known = [
            (record.durable_epoch, bytes.fromhex(record.durable_hash))
            for record in self.superblock.peers.values()
            if record.durable_hash and first.first_number <= record.durable_epoch + 1
        ]
        known.append((first.number, first.chain_hash))
        start = min(known)
        return start if start[0] <= self.applied_epoch else (self.applied_epoch, self.applied_hash)

    def _keep_for(self, peers: Iterable[str], epoch: int, chain_hash: bytes) -> None:
        """Give every other member the same position: what follows it is kept."""
        superblock = self.superblock
        before = set(superblock.peers)
        superblock.peers = {
            name: PeerRecord(durable_epoch=epoch, durable_hash=chain_hash.hex())
            for name in sorted(peers)
        }
        for name in superblock.peers:
            self.retain(name, epoch)
        for name in before - set(superblock.peers):
            self.release(name)

    def _checkpoint(self) -> CheckpointJob:
        job = self.checkpoint_job()
        assert job is not None, "the role has changed"
        return job
