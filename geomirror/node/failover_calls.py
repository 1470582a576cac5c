"""Methods about promotion. Only the verdict is there yet: what promoting a copy would lose.

Any member can be asked, the primary may be dead: this node asks all members that it has a link to,
and judges by what they answer (`cluster.verdict`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from geomirror.cluster.standing import is_sane
from geomirror.cluster.verdict import MemberAnswer, assess
from geomirror.errors import GeomirrorError, NotFoundError
from geomirror.node.calls import Caller, MethodRegistry, Parameters, Result
from geomirror.node.definition_push import Calls
from geomirror.node.definition_store import DefinitionStore
from geomirror.node.failover_report import report
from geomirror.node.resource_definition import ResourceDefinition
from geomirror.node.resource_host import ResourceHost

ANSWER_TIMEOUT_S = 5.0
"""A member that does not answer by then counts as away: its link may be dead unnoticed."""


class Assess(Parameters, frozen=True):
    """`failover --dry-run`"""

    name: str
    to: str


class Answer(Parameters, frozen=True):
    """Asked of a member by another one."""

    resource_id: str


@dataclass
class FailoverCalls:
    """Handlers; the node's parts that they act on are given once."""

    host: ResourceHost
    store: DefinitionStore
    links: Calls
    is_connected: Callable[[str], bool]

    def register(self, methods: MethodRegistry) -> None:
        """Add every method."""
        methods.add("failover.assess", Assess, self.assess)
        methods.add("failover.answer", Answer, self.answer, from_peers=True)

    async def assess(self, _caller: Caller, request: Assess) -> Result:
        """What promoting `to` would lose. Changes nothing.

        :raises NotFoundError: no such resource here, or `to` is no member of it.
        """
        definition = self.store.get(request.name).definition
        if request.to not in definition.members:
            raise NotFoundError(
                f'node "{request.to}" has no copy of "{request.name}"',
                hint=f"members are {', '.join(definition.members)}",
            )
        asked = (self._ask(node, definition) for node in definition.members)
        answers = await asyncio.gather(*asked)
        return report(definition, request.to, answers, assess(request.to, answers))

    async def answer(self, caller: Caller, request: Answer) -> Result:
        """What this member knows.

        :raises RefusedError: the caller is no member.
        """
        definition = self.store.asked_by(caller.peer, request.resource_id)
        answer = await self.host.get(definition.name).answer()
        found = msgspec.to_builtins(answer)
        assert isinstance(found, dict)
        return found

    async def _ask(self, node: str, definition: ResourceDefinition) -> MemberAnswer:
        context = self.host.context
        try:
            if node == context.name:
                return await self.host.get(definition.name).answer()
            if not self.is_connected(node):
                return MemberAnswer(node, error="no link")
            parameters: dict[str, Any] = {"resource_id": definition.resource_id}
            raw = await self.links.call(node, "failover.answer", parameters, ANSWER_TIMEOUT_S)
        except GeomirrorError as error:
            return MemberAnswer(node, error=error.message or "no answer")
        return _checked(node, raw)


def _checked(node: str, raw: dict[str, Any]) -> MemberAnswer:
    """A member's answer, as far as it can be believed."""
    try:
        answer = msgspec.convert(raw, MemberAnswer, strict=True)
    except (msgspec.ValidationError, ValueError):
        return MemberAnswer(node, error="answers in another way; do both run the same version?")
    standing = answer.standing
    if (
        answer.node != node
        or answer.epoch < 0
        or answer.token < 0
        or (standing is not None and not is_sane(standing))
    ):
        return MemberAnswer(node, error="answers with impossible fields")
    return answer
