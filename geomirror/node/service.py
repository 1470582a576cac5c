"""What the node expects of a running resource. `ReplicaService` is the real one; tests use a small
one of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from geomirror.node.context import NodeContext
from geomirror.node.resource_definition import ResourceDefinition

if TYPE_CHECKING:
    from geomirror.cluster.history import History
    from geomirror.cluster.verdict import MemberAnswer
    from geomirror.errors import GeomirrorError
    from geomirror.nbd.protocol import Export
    from geomirror.node.branch_desk import BranchDesk
    from geomirror.node.mark_desk import MarkDesk
    from geomirror.node.rewind_plan import RewindPlan
    from geomirror.node.verify_desk import VerifyDesk
    from geomirror.node.view_host import ViewHost
    from geomirror.volume.superblock import GenerationRecord, VolumeRecord
    from geomirror.volume.volume_change import VolumeChange
    from geomirror.wan_protocol.messages import AnyMessage, GenerationEntry, StartEntry


class Service(Protocol):
    """One resource on this node."""

    definition: ResourceDefinition
    rejoin_refusal: str
    """Why it has not come back, though it may."""
    other_since: dict[str, Any]
    """What the history that outranks this one has since they part; see `tail`."""
    on_outranked: Callable[[], None]
    """Called when it is outranked, or what decides about its return has changed."""
    on_rejoined: Callable[[str], None]
    """Called when it follows again, with the name of its primary."""

    @property
    def marks(self) -> MarkDesk:
        """Names of points in time."""

    @property
    def verifies(self) -> VerifyDesk:
        """Comparisons of other copies with this one."""

    @property
    def views(self) -> ViewHost:
        """Earlier points in time of it."""

    @property
    def branches(self) -> BranchDesk:
        """What was cut off."""

    @property
    def role(self) -> str:
        """`primary` or `secondary`."""

    @property
    def put_back_primary(self) -> str:
        """The primary that this copy refuses because it has lost epochs that are here, or ""."""

    @property
    def primary_token(self) -> int | None:
        """Fencing token of the generation that may be written here; None at anybody else."""

    async def promote(
        self, reason: str, install: Callable[[GenerationRecord], ResourceDefinition]
    ) -> GenerationRecord:
        """Become the primary."""

    async def hear(
        self, peer: str, chain: Sequence[GenerationEntry], starts: Sequence[StartEntry] = ()
    ) -> bool:
        """A member knows of this chain; whether this one is outranked now and has a tail."""

    @property
    def is_outranked(self) -> bool:
        """It has a tail that a history with a higher token lacks, and accepts nothing."""

    @property
    def rejoins_by_itself(self) -> bool:
        """It gives its tail up as a branch without being asked."""

    def tail(self) -> dict[str, Any]:
        """What an outranked member has that the other history has not."""

    def tail_beyond(self, other: History) -> dict[str, Any]:
        """What this member has that another history has not."""

    def since(self, epoch: int) -> dict[str, Any]:
        """`epochs`, `seconds`, `bytes` that are here after an epoch."""

    def history(self) -> dict[str, Any]:
        """What this member has, and of whom it has heard."""

    async def follow(self, *, gives_up_tail: bool = False) -> str:
        """Become a secondary of what outranks this member."""

    @property
    def must_reopen(self) -> bool:
        """Something was begun that only opening the resource again ends."""

    def leave(self, error: GeomirrorError) -> None:
        """End the session with the primary: the resource is about to be opened again."""

    def offer(self, peer: str) -> None:
        """Offer a member a session now."""

    async def hand_over(self, heirs: list[str], timeout_s: float) -> dict[str, Any]:
        """Become a secondary once every heir has everything."""

    async def start(self) -> None:
        """Begin to serve."""

    async def stop(self) -> None:
        """Seal, flush, close."""

    def exports(self) -> dict[str, Export]:
        """NBD exports by name: `RES/VOLUME`, and `RES` for the first volume."""

    def status(self) -> dict[str, Any]:
        """The resource's object of `status --json`."""

    def position(self) -> dict[str, Any]:
        """Where the resource is now."""

    async def answer(self) -> MemberAnswer:
        """What this member knows, for the verdict on a promotion."""

    def plan(self) -> RewindPlan:
        """What going back would take out of the volumes."""

    async def wait(self, kind: str, timeout_s: float) -> None:
        """Until every peer has all that is completed now."""

    def volumes(self) -> list[VolumeRecord]:
        """The volumes now, by index; `peers` are backings at other nodes."""

    async def grow(self, change: VolumeChange) -> int:
        """Grow or add a volume; returns the epoch that has it, sealed."""

    def pause(self, peer: str | None) -> None:
        """Stop sending to a peer, or to all."""

    def resume(self, peer: str | None) -> None:
        """Go on sending."""

    def set_definition(self, definition: ResourceDefinition, *, is_forced: bool = False) -> None:
        """Take over a changed definition; `is_forced`: without waiting for members that rely on
        the old settings."""

    def link_up(self, peer: str) -> None:
        """The link to a member is there, and the member knows the resource."""

    def link_down(self, peer: str) -> None:
        """The link to a member is gone."""

    def message(self, peer: str, session: int, message: AnyMessage) -> None:
        """A message of this resource's session."""

    def frame(
        self, peer: str, session: int, epoch: int, sequence: int, is_resync: bool, body: bytes
    ) -> None:
        """A data frame of this resource's session."""

    def writable(self, peer: str) -> None:
        """The link's queues have room again."""


class ServiceFactory(Protocol):
    """Makes services; both calls block and run on a worker thread."""

    def create(self, definition: ResourceDefinition, node: NodeContext) -> Service:
        """Make the state on disk."""

    def open(self, definition: ResourceDefinition, node: NodeContext) -> Service:
        """Recover the state on disk."""
