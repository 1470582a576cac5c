"""Which history each node is on, and what must be true when it changes to another one.

A node is on the history of the last generation of its chain; where that forked because a disk was
put back, on the line of the last start of a primary that it has heard of. It goes over to another
one by a promotion, by following, or by giving up a tail. O6: whatever it had beyond the last common
epoch is then a branch, whole: base and branch together are S(end of the tail), and nothing that was
confirmed or reported as durable is beyond that end. I8: nobody goes over to a lower claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from geomirror.errors import LimitExceededError, NotFoundError
from geomirror.volume.branches import BranchRecord
from geomirror.volume.superblock import GenerationRecord, Superblock
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
    """History → the node that writes it."""
    forked: dict[str, list[Oracle]] = field(default_factory=dict)
    """Generation → its lines after the first one."""
    of_start: dict[str, Oracle] = field(default_factory=dict)
    """Start of a primary → the line that it writes."""
    older: dict[str, Oracle] = field(default_factory=dict)
    """Node whose disk was put back → the line that it is on until it leaves it."""
    begun: set[str] = field(default_factory=set)
    """Histories that were written to."""
    tails: int = 0
    """Branches compared."""
    rewinds: int = 0
    """Contents compared after a rewind or its return."""
    taken_in: dict[str, BranchRecord] = field(default_factory=dict)
    """Branches of rewinds that were to be taken back in, by name."""

    def line_of(self, superblock: Superblock, chain: Sequence[GenerationRecord]) -> Oracle:
        """The history that a chain ends in, at somebody with this superblock."""
        return self._line_in(superblock, chain[-1].identity) if chain else self.root

    def line_at(self, node: SimNode) -> Oracle:
        """The history that a node is on."""
        superblock = node.engine.superblock
        return self._own_line(node, superblock.chain[-1].identity if superblock.chain else "")

    def _own_line(self, node: SimNode, generation: str) -> Oracle:
        superblock = node.engine.superblock
        if not generation:
            return self.root
        older = self.older.get(node.name)
        if superblock.role == "primary" and older is not None and older.generation == generation:
            return older
        return self._line_in(superblock, generation)

    def _line_in(self, superblock: Superblock, generation: str) -> Oracle:
        line = self.lines[generation]
        if generation not in self.forked:
            return line
        known = [self.of_start.get(each.identity, line) for each in superblock.starts]
        return next((each for each in reversed(known) if each.generation == generation), line)

    def put_back(self, node: SimNode, line: Oracle) -> None:
        """The node's disk is an older one, of a primary: it goes on from there."""
        self.forget(node)
        self.forked.setdefault(line.generation, []).append(line)
        self.older[node.name] = line
        self.written[line.key] = node.name
        mirror = self.mirror(node)
        mirror.line, mirror.durable_epoch = line, line.sealed_epoch

    def is_put_back(self, node: SimNode) -> bool:
        """Whether it writes on from an older disk, or did."""
        return self.line_at(node).generation in self.forked

    def recovered(self, node: SimNode) -> None:
        """A primary has come back: an older disk may hold epochs that were being sealed then."""
        line = self.older.get(node.name)
        if line is not None and line is self.line_at(node) and line.key not in self.begun:
            assert line.parent is not None
            line.base_epoch = node.engine.sealed_epoch

    def began(self, node: SimNode) -> None:
        """It serves as a primary: this start of it is listed."""
        line = self.line_at(node)
        self.begun.add(line.key)
        self.of_start[node.engine.superblock.starts[-1].identity] = line

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
        parent = self._own_line(node, last.parent)
        if self.written.get(parent.key) == node.name:
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

    def begin_rewound(self, node: SimNode, chain: Sequence[GenerationRecord]) -> None:
        """A rewind, or its return, may write a superblock with this chain; again after a crash."""
        engine, last, current = node.engine, chain[-1], node.oracle
        known = self.lines.get(last.identity)
        if known is None and self.is_writer(node):
            kept = engine.epoch_numbers()
            for number in range(current.sealed_epoch + 1, engine.sealed_epoch + 1):
                if number in kept:
                    current.sealed(number, engine.epoch_info(number).chain_hash)
        line = self.lines[last.parent].fork(last.identity, last.parent_epoch)
        self.lines[last.identity] = line
        self.written[last.identity] = last.by
        mirror = self.mirror(node)
        if known is not None and mirror.line is known:
            # What was taken in so far is taken in once more; nobody was told of it.
            mirror.line = line
            mirror.durable_epoch = min(mirror.durable_epoch, last.parent_epoch)

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
        self.older.pop(node.name, None)
        for history in [each for each, name in self.written.items() if name == node.name]:
            del self.written[history]

    def is_writer(self, node: SimNode) -> bool:
        """Whether the history that the node is on is its own, and it never gave up any of it."""
        return self.written.get(node.oracle.key) == node.name

    def look(self, node: SimNode) -> None:
        """The node may have gone over to another history, or back on its own."""
        mirror, line = self.mirror(node), node.oracle
        position, old = node.engine.sealed_epoch, mirror.line
        assert old is not None
        was_writer = self.written.get(old.key) == node.name
        floor = max(mirror.durable_epoch, old.sealed_epoch if was_writer else 0)
        if line is old and (node.is_copying or position >= floor):
            return
        self._check_claim(node, old)
        # It may have gone back further, to a state that is kept.
        common = min(line.common_epoch(old), ENDLESS if node.is_copying else position)
        if floor > common:
            self._check_kept(node, old, common, floor, is_writer=was_writer)
            if was_writer:
                del self.written[old.key]
        mirror.durable_epoch = min(floor, common)
        if mirror.at_epoch > common:
            mirror.content, mirror.at_epoch = self.root.blank(), 0
        mirror.line = line
        if self.older.get(node.name, line) is not line:
            del self.older[node.name]

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
            line = old
            if record.generation != old.generation:
                if self.forked:
                    continue  # Which of several lines it is of, nobody remembers.
                # One of a later generation begins with epochs of those before it.
                line = self.lines[record.generation]
            reached = min(record.end_epoch, line.common_epoch(old))
            if record.base_epoch > common or reached < floor:
                continue
            self.check_branch(node, record, line)
            count = old.epoch_prefix[reached]
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

    def check_branches(self, node: SimNode) -> None:
        """O6 for all that a node has; of which line one is, nobody remembers where disks were put
        back."""
        for record in node.engine.branches.records():
            first, *others = self.lines[record.generation], *self.forked.get(record.generation, [])
            wrong: OracleError | None = None
            for line in (first, *others):
                try:
                    self.check_branch(node, record, line)
                    break
                except (OracleError, KeyError) as error:
                    if not others:
                        raise
                    wrong = OracleError(f"of {1 + len(others)} lines of none: {error}")
            else:
                assert wrong is not None
                raise wrong

    def check_branch(self, node: SimNode, record: BranchRecord, line: Oracle) -> None:
        """O6: its contents over those of its base are those of its end."""
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
