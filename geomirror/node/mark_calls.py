"""Methods about marks. They are made at the primary; any member lists what all members say."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from geomirror.errors import GeomirrorError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.mark_desk import MarkDesk, describe_mark
from geomirror.node.resource_calls import ResourceCalls
from geomirror.node.resource_definition import ResourceDefinition

ANSWER_TIMEOUT_S = 5.0
"""A member that does not answer by then counts as away."""
MARK_KEYS = ("name", "generation", "epoch", "time", "consistency")
SECONDS_MORE = 5.0
"""What a forwarded call may take longer than what it waits for."""


class CreateMark(Parameters, frozen=True):
    """`mark RES NAME`"""

    name: str
    mark: str
    timeout_s: float = 30.0


class ConfirmMark(Parameters, frozen=True):
    """The application was quiet when this mark was cut."""

    name: str
    mark: str
    epoch: int
    timeout_s: float = 30.0


class DeleteMark(Parameters, frozen=True):
    """`mark RES NAME --delete`"""

    name: str
    mark: str
    timeout_s: float = 30.0


class ListMarks(Parameters, frozen=True):
    """`mark RES --list`"""

    name: str


class LocalMarks(Parameters, frozen=True):
    """Asked of a member by another one."""

    resource_id: str


class LocalMark(msgspec.Struct):
    """A mark as a member describes it."""

    name: str
    generation: str
    epoch: int
    time: str
    consistency: str
    held: bool
    viewable: bool
    reason: str


class LocalAnswer(msgspec.Struct):
    """What a member says."""

    epoch: int
    marks: list[LocalMark]


@dataclass
class MarkCalls:
    """Handlers beside those of `ResourceCalls`."""

    calls: ResourceCalls

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("mark.create", CreateMark, self.create, from_peers=True)
        methods.add("mark.confirm", ConfirmMark, self.confirm, from_peers=True)
        methods.add("mark.delete", DeleteMark, self.delete, from_peers=True)
        methods.add("mark.list", ListMarks, self.list_all)
        methods.add("mark.local", LocalMarks, self.local, from_peers=True)

    async def create(self, caller: Caller, request: CreateMark) -> Result:
        """Mark the state of this instant; crash-consistent until it is confirmed."""
        desk = self._desk_here(request.name)
        if desk is None:
            return await self._forward(caller, "mark.create", request, request.timeout_s)
        mark = await desk.create(request.mark, request.timeout_s)
        return {"resource": request.name, **describe_mark(mark)}

    async def confirm(self, caller: Caller, request: ConfirmMark) -> Result:
        """Note that a mark is application-consistent."""
        desk = self._desk_here(request.name)
        if desk is None:
            return await self._forward(caller, "mark.confirm", request, request.timeout_s)
        mark = await desk.confirm(request.mark, request.epoch, request.timeout_s)
        return {"resource": request.name, **describe_mark(mark)}

    async def delete(self, caller: Caller, request: DeleteMark) -> Result:
        """Take a mark back, on all members in time."""
        desk = self._desk_here(request.name)
        if desk is None:
            return await self._forward(caller, "mark.delete", request, request.timeout_s)
        mark = await desk.delete(request.mark, request.timeout_s)
        fields = {"resource": request.name, "mark": mark.name, "epoch": mark.epoch}
        self.calls.host.context.emit("mark_deleted", {**fields, "by": caller.name})
        return {"resource": request.name, **describe_mark(mark)}

    async def list_all(self, _caller: Caller, request: ListMarks) -> Result:
        """Every mark that any member knows, and who holds it. The primary may be away."""
        definition = self.calls.store.get(request.name).definition
        members = definition.members
        answers = await asyncio.gather(*(self._ask(node, definition) for node in members))
        told = dict(zip(members, answers, strict=True))
        own = self.calls.host.context.name
        return {"resource": request.name, "node": own, "marks": _merged(told, own)}

    async def local(self, caller: Caller, request: LocalMarks) -> Result:
        """What this member knows of marks. :raises RefusedError: the caller is no member."""
        definition = self.calls.store.asked_by(caller.peer, request.resource_id)
        return self.calls.host.get(definition.name).marks.describe()

    async def _ask(self, node: str, definition: ResourceDefinition) -> dict[str, Any] | str:
        """What a member says, or why it does not."""
        try:
            if node == self.calls.host.context.name:
                return self.calls.host.get(definition.name).marks.describe()
            if not self.calls.is_connected(node):
                return "no link to this member"
            parameters = {"resource_id": definition.resource_id}
            answer = await self.calls.links.call(node, "mark.local", parameters, ANSWER_TIMEOUT_S)
        except GeomirrorError as error:
            return error.message or "no answer"
        try:
            return msgspec.to_builtins(msgspec.convert(answer, LocalAnswer))  # type: ignore[no-any-return]
        except msgspec.ValidationError:
            return "it answers in another way; do both run the same version?"

    def _desk_here(self, name: str) -> MarkDesk | None:
        definition = self.calls.store.get(name).definition
        if definition.primary != self.calls.host.context.name:
            return None
        return self.calls.host.get(name).marks

    async def _forward(
        self,
        caller: Caller,
        method: str,
        request: CreateMark | ConfirmMark | DeleteMark,
        timeout_s: float,
    ) -> Result:
        primary = self.calls.store.get(request.name).definition.primary
        return await self.calls.forward(caller, primary, method, request, timeout_s + SECONDS_MORE)


def _merged(told: dict[str, dict[str, Any] | str], own: str) -> list[dict[str, Any]]:
    """Marks by what they name, ascending by epoch, each with what all members say.

    `held`, `viewable` and `reason` of the mark itself are those of the member that is asked.
    """
    found: dict[tuple[int, str, str], dict[str, Any]] = {}
    for answer in told.values():
        for mark in answer["marks"] if not isinstance(answer, str) else []:
            known = found.setdefault(_key(mark), {k: mark[k] for k in MARK_KEYS})
            if mark["consistency"] == "application":
                known["consistency"] = "application"  # Others are not told yet.
    marks = []
    for key, mark in sorted(found.items()):
        members = [_member(node, answer, key) for node, answer in told.items()]
        here = next((each for each in members if each["node"] == own), {})
        state = {name: here.get(name) for name in ("held", "viewable", "reason")}
        marks.append({**mark, **state, "members": members})
    return marks


def _key(mark: dict[str, Any]) -> tuple[int, str, str]:
    return mark["epoch"], mark["name"], mark["generation"]


def _member(node: str, answer: dict[str, Any] | str, key: tuple[int, str, str]) -> dict[str, Any]:
    """Whether a member holds a mark; None where nobody can say."""
    if isinstance(answer, str):
        return _said(node, None, None, None, answer)
    for mark in answer["marks"]:
        if _key(mark) == key:
            return _said(node, True, mark["held"], mark["viewable"], mark["reason"])
    epoch, reason = answer["epoch"], "this copy was not told of it, or it was deleted"
    if epoch < key[0]:
        reason = f"it has not come yet: this copy is at epoch {epoch}"
    return _said(node, False, False, False, reason)


def _said(
    node: str, known: bool | None, held: bool | None, viewable: bool | None, reason: str
) -> dict[str, Any]:
    return {"node": node, "known": known, "held": held, "viewable": viewable, "reason": reason}
