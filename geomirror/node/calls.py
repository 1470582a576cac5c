"""The methods of a node: name, parameters, handler.

One registry serves the local operator (through the control socket) and other nodes (through an
authenticated link); the latter get only the methods that say so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import structlog

from geomirror.errors import GeomirrorError, LocalProtocolError, RefusedError, UsageError

_log = structlog.get_logger(component="calls")

Result = dict[str, Any]
P = TypeVar("P", bound="Parameters")


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all methods' parameters; without fields for a method that takes none."""


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    peer: str | None = None
    """Authenticated node at the other end of the link; None: this machine's operator."""
    user: str = ""
    """The operator, as the kernel knows him."""

    @property
    def name(self) -> str:
        """For messages and events."""
        return self.peer or "operator"


Handler = Callable[[Caller, P], Awaitable[Result]]


@dataclass(frozen=True)
class Method(Generic[P]):
    """One method."""

    name: str
    parameters: type[P]
    handler: Handler[P]
    from_peers: bool
    """Other nodes may call it; the handler then checks which of them."""


Note = Callable[[Caller, str, Mapping[str, Any], GeomirrorError | None], Awaitable[None]]
"""Told of every call that ended: who, which method, its parameters, and its error."""


async def _note_nothing(*_: object) -> None:
    pass


class MethodRegistry:
    """All methods of a node."""

    def __init__(self) -> None:
        self._methods: dict[str, Method[Any]] = {}
        self.note: Note = _note_nothing

    def add(
        self, name: str, parameters: type[P], handler: Handler[P], *, from_peers: bool = False
    ) -> None:
        """Register a method; each name once."""
        assert name not in self._methods, name
        self._methods[name] = Method(name, parameters, handler, from_peers)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._methods)

    async def dispatch(self, caller: Caller, name: str, raw: Mapping[str, Any]) -> Result:
        """Validate the parameters and run the handler.

        :raises UsageError: unknown method, or parameters of a wrong shape.
        :raises RefusedError: a peer asked for a method that only the operator may call.
        :raises LocalProtocolError: the handler has a bug; logged.
        """
        method = self._methods.get(name)
        if method is None:
            raise UsageError(f"unknown method {name!r}", hint="do both run the same version?")
        if caller.peer is not None and not method.from_peers:
            raise RefusedError(f"method {name} is not open to other nodes")
        try:
            parameters = msgspec.convert(raw, method.parameters, strict=True)
        except msgspec.ValidationError as error:
            raise UsageError(f"method {name}: {error}") from error
        try:
            result = await self._run(method, caller, parameters)
        except GeomirrorError as error:
            await self.note(caller, name, raw, error)
            raise
        await self.note(caller, name, raw, None)
        return result

    async def _run(self, method: Method[P], caller: Caller, parameters: P) -> Result:
        try:
            return await method.handler(caller, parameters)
        except GeomirrorError:
            raise
        except Exception as error:
            # Supervisor: a bug in one call ends that call, not the node.
            _log.exception("call_failed", method=method.name, caller=caller.name)
            kind = type(error).__name__
            raise LocalProtocolError(
                f"internal error in {method.name}: {kind}: {error}",
                hint="the daemon's log has more",
            ) from error
