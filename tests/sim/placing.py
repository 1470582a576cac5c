"""Which history each node is on, and what must be true when it changes to another one.

A node is on the history of the last generation of its chain. It goes over to another one by a
promotion, by following, or by giving up a tail. O6: whatever it had beyond the last common epoch
is then a branch, whole: base and branch together are S(end of the tail), and nothing that was
confirmed or reported as durable is beyond that end. I8: nobody goes over to a lower claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomirror.errors import LimitExceededError, NotFoundError
from geomirror.volume.branches import BranchRecord
from geomirror.volume.superblock import GenerationRecord
from geomirror.volume.undo_file import KIND_SIZE
from tests.sim.oracle import BLOCK, ENDLESS, Mirror, Oracle, OracleError

if TYPE_CHECKING:
    from tests.sim.node import SimNode


@dataclass
class Placing:
    """All histories of a run."""

    root: Oracle
    lines: dict[str, Oracle] = field(default_factory=dict)
    """Generation → history."""
    claims: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Node → (token, generation) of the highest chain that it has acted upon."""
    written: dict[str, str] = field(default_factory=dict)
    """Generation → the node that writes it."""
    tails: int = 0
    """Branches compared."""

    def line_of(self, chain: Sequence[GenerationRecord]) -> Oracle:
        """The history that a chain ends in."""
        return self.lines[chain[-1].identity] if chain else self.root

    def begin(self, first: GenerationRecord) -> None:
        """The resource is made, with this generation."""
        self.lines[first.identity] = self.root
        self.root.generation = first.identity
        self.written[first.identity] = first.by

    def begin_generation(self, node: SimNode) -> None:
        """A superblock with this node's chain may be written."""
        engine, chain = node.engine, node.engine.superblock.chain
        if not chain or chain[-1].identity in self.lines:
            return
        last = chain[-1]
        parent = self.lines[last.parent]
        if self.written.get(parent.generation) == node.name:
            # What was in no epoch was sealed just before.
            kept = engine.epoch_numbers()
            for number in range(parent.sealed_epoch + 1, engine.sealed_epoch + 1):
                if number in kept:
                    parent.sealed(number, engine.epoch_info(number).chain_hash)
                elif number == last.parent_epoch:
                    # Applied since then, and nobody needs it any more.
                    parent.sealed(number, bytes.fromhex(last.parent_hash))
        line = parent.fork(last.identity, last.parent_epoch)
        known = parent.epoch_hash.get(last.parent_epoch)
        if last.parent_epoch and known not in (None, bytes.fromhex(last.parent_hash)):
            raise OracleError(f"{last.by} begins a generation at another epoch {last.parent_epoch}")
        self.lines[last.identity] = line
        self.written[last.identity] = last.by

    def mirror(self, node: SimNode) -> Mirror:
        """What is known of a node's copy."""
        mirrors = self.root.mirrors
        if node.name not in mirrors:
            mirrors[node.name] = Mirror(self.root.blank())
        found = mirrors[node.name]
        if found.line is None:
            found.line = self.root
        return found

    def forget(self, node: SimNode) -> None:
        """Its disk is blank or an older one from now on: what it had is no promise any more."""
        self.root.mirrors[node.name] = Mirror(self.root.blank())
        self.claims.pop(node.name, None)
        for generation in [each for each, name in self.written.items() if name == node.name]:
            del self.written[generation]

    def is_writer(self, node: SimNode) -> bool:
        """Whether the history that the node is on is its own, and it never gave up any of it."""
        return self.written.get(node.oracle.generation) == node.name

    def look(self, node: SimNode) -> None:
        """The node may have gone over to another history, or back on its own."""
        mirror, line = self.mirror(node), node.oracle
        position, old = node.engine.sealed_epoch, mirror.line
        assert old is not None
        was_writer = self.written.get(old.generation) == node.name
        floor = max(mirror.durable_epoch, old.sealed_epoch if was_writer else 0)
        if line is old and (node.is_copying or position >= floor):
            return
        self._check_claim(node, old)
        # It may have gone back further, to a state that is kept.
        common = min(line.common_epoch(old), ENDLESS if node.is_copying else position)
        if floor > common:
            self._check_kept(node, old, common, floor, is_writer=was_writer)
            if was_writer:
                del self.written[old.generation]
        mirror.durable_epoch = min(floor, common)
        if mirror.at_epoch > common:
            mirror.content, mirror.at_epoch = self.root.blank(), 0
        mirror.line = line

    def _check_claim(self, node: SimNode, old: Oracle) -> None:
        chain, line = node.engine.superblock.chain, node.oracle
        claim = (chain[-1].token, chain[-1].identity) if chain else (0, "")
        # Going back it is for a moment on the history that the one it gave up came from.
        is_going_back = any(each is line for each in old.ancestry())
        if not is_going_back:
            self.check_claim(node, claim, "goes over to")

    def check_claim(self, node: SimNode, claim: tuple[int, str], what: str) -> None:
        """I8: nobody acts upon a lower claim than it did before."""
        highest = self.claims.get(node.name, (0, ""))
        if claim < highest:
            raise OracleError(f"I8: {node.name} {what} token {claim[0]}, it knows {highest[0]}")

    def acted(self, node: SimNode, chain: Sequence[GenerationRecord]) -> None:
        """It told others of this chain, or stopped for it: that has to be durable."""
        if chain:
            claim = (chain[-1].token, chain[-1].identity)
            self.claims[node.name] = max(claim, self.claims.get(node.name, (0, "")))

    def _check_kept(
        self, node: SimNode, old: Oracle, common: int, floor: int, *, is_writer: bool
    ) -> None:
        """What the node had beyond a common epoch is a branch."""
        for record in node.engine.branches.records():
            is_of_it = self.lines[record.generation] is old and record.base_epoch <= common
            if not is_of_it or record.end_epoch < floor:
                continue
            self.check_branch(node, record)
            count = old.epoch_prefix[record.end_epoch]
            if is_writer and old.flushed > count:
                raise OracleError(
                    f"O6: branch {record.name} of {node.name} holds {count} operations, "
                    f"{old.flushed} were confirmed"
                )
            return
        raise OracleError(
            f"O6: {node.name} leaves {old.generation[:8]} after epoch {common}, it had {floor}: "
            "no branch holds the rest"
        )

    def check_branch(self, node: SimNode, record: BranchRecord) -> None:
        """O6: its contents over those of its base are those of its end."""
        line = self.lines[record.generation]
        base = line.content_at(record.base_epoch)
        expected = line.content_at(record.end_epoch)
        sizes = line.epoch_sizes[record.end_epoch]
        found = {v: bytearray(base.get(v, b"").ljust(size, b"\0")) for v, size in sizes.items()}
        where = f"O6: branch {record.name} of {node.name}"
        with node.store.undisturbed():
            reader = node.engine.branches.reader(record.name)
            try:
                for volume, kind, first, count in reader.entries():
                    if kind == KIND_SIZE:
                        continue
                    for block in range(first, first + count):
                        content = reader.read_block(volume, block)
                        assert content is not None
                        start = block * BLOCK
                        size = min(BLOCK, len(found[volume]) - start)
                        found[volume][start : start + size] = content[:size]
            finally:
                reader.close()
            if found != expected:
                raise OracleError(f"{where} is not S({record.end_epoch})")
            self._check_view(node, record, expected, where)
        self.tails += 1
        line.checks += 1

    def _check_view(
        self, node: SimNode, record: BranchRecord, expected: dict[int, bytes], where: str
    ) -> None:
        try:
            view = node.engine.view_branch(record.name)
        except NotFoundError:
            return  # There was no room for the undo that leads to its base.
        try:
            for volume, content in expected.items():
                if view.read(volume, 0, len(content)) != content:
                    raise OracleError(f"{where}: its view is not S({record.end_epoch})")
        except (NotFoundError, LimitExceededError):
            return
        finally:
            view.close()
