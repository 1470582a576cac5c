"""Who may reach what: the services that this node exposes, and the ports that it forwards.

```
 exposures   name ─▶ HOST:PORT here, and the keys that may use it (none named: every member)
 forwards    HOST:PORT here ─▶ name, at whoever exposes it, or at one node
```
Invariant: what is in no exposure is reached by nobody; a node is known by its key, so that another
one that gets its name later does not get its rights.
Deliberately not here: files, sockets, circuits that exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from geomirror.errors import InUseError, NotFoundError, RefusedError, UsageError
from geomirror.limits import Limits
from geomirror.tunnel.names import check_name, join_endpoint, split_endpoint


class Exposure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A TCP port that others may reach under a name."""

    name: str
    host: str
    port: int
    allow: tuple[str, ...] = ()
    """Node ids; empty: every member of the network."""

    @property
    def target(self) -> str:
        """`HOST:PORT` that is connected to."""
        return join_endpoint(self.host, self.port)

    def allows(self, node_id: str) -> bool:
        """Whether this key may use it."""
        return not self.allow or node_id in self.allow


class Forward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A port of this machine that leads to a service of another node."""

    name: str
    host: str
    port: int
    node_id: str = ""
    """Only to the node of this key; empty: whoever exposes it."""

    @property
    def listen(self) -> str:
        """`HOST:PORT` that applications connect to."""
        return join_endpoint(self.host, self.port)


class ServiceRules:
    """All of one node. A change is checked as a whole before anything is changed."""

    def __init__(
        self, limits: Limits, exposures: Iterable[Exposure] = (), forwards: Iterable[Forward] = ()
    ) -> None:
        self._limits = limits
        self.exposures = {item.name: item for item in exposures}
        self.forwards = {item.listen: item for item in forwards}

    def with_exposure(self, exposure: Exposure) -> ServiceRules:
        """As these, with one more, or another one of its name.

        :raises UsageError: a name, host or port that cannot be.
        :raises RefusedError: too many.
        """
        _check(exposure.name, exposure.target, exposure.port, least=1)
        found = {**self.exposures, exposure.name: exposure}
        if len(found) > self._limits.services_max:
            raise RefusedError(f"a node exposes at most {self._limits.services_max} services")
        return ServiceRules(self._limits, found.values(), self.forwards.values())

    def without_exposure(self, name: str) -> ServiceRules:
        """As these, without it. :raises NotFoundError: it is not exposed."""
        if name not in self.exposures:
            raise NotFoundError(
                f'this node exposes no service "{name}"', hint='see "geomirror service list"'
            )
        found = [item for item in self.exposures.values() if item.name != name]
        return ServiceRules(self._limits, found, self.forwards.values())

    def with_forward(self, forward: Forward) -> ServiceRules:
        """As these, with one more; the same one again may go to another node.

        :raises UsageError: a name, host or port that cannot be.
        :raises InUseError: that port is forwarded to another service.
        :raises RefusedError: too many.
        """
        _check(forward.name, forward.listen, forward.port, least=0)
        known = self.forwards.get(forward.listen)
        if known is not None and known.name != forward.name:
            raise InUseError(
                f'{forward.listen} is forwarded to "{known.name}" already',
                hint=f'choose another port, or "geomirror unforward {known.name} {known.port}"',
            )
        found = {**self.forwards, forward.listen: forward}
        if len(found) > self._limits.services_max:
            raise RefusedError(f"a node has at most {self._limits.services_max} forwards")
        return ServiceRules(self._limits, self.exposures.values(), found.values())

    def forwards_of(self, name: str, port: int | None) -> list[Forward]:
        """The forwards of a service, or the one at a port.

        :raises NotFoundError: there is none.
        """
        found = [each for each in self.forwards.values() if each.name == name]
        found = [each for each in found if port in (None, each.port)]
        if not found:
            where = "" if port is None else f" at port {port}"
            raise NotFoundError(
                f'"{name}" is not forwarded here{where}', hint='see "geomirror service list"'
            )
        return found

    def without_forwards(self, gone: Iterable[Forward]) -> ServiceRules:
        """As these, without some."""
        names = {item.listen for item in gone}
        kept = [item for item in self.forwards.values() if item.listen not in names]
        return ServiceRules(self._limits, self.exposures.values(), kept)

    def exposed_to(self, name: str, node_id: str) -> Exposure:
        """What a node reaches under a name.

        :raises NotFoundError: nothing has that name.
        :raises RefusedError: this node may not.
        """
        exposure = self.exposures.get(name)
        if exposure is None:
            raise NotFoundError(f'no service "{name[:64]}" is exposed there')
        if not exposure.allows(node_id):
            raise RefusedError(
                f'the service "{name}" is not open to this node',
                hint='its holder says who may: "geomirror expose --allow"',
            )
        return exposure

    def names_for(self, node_id: str) -> list[str]:
        """What a node is told of, sorted."""
        return sorted(item.name for item in self.exposures.values() if item.allows(node_id))


@dataclass(frozen=True)
class Holder:
    """A node that exposes a service, as another one sees it."""

    node: str
    node_id: str
    is_connected: bool
    rtt_ns: int
    """0: not measured yet."""


def in_order(holders: Iterable[Holder], node_id: str = "") -> list[Holder]:
    """Whom to ask, nearest first; those that are not connected are left out.

    :param node_id: nobody else than this one, if it is given.
    """
    found = [each for each in holders if each.is_connected and node_id in ("", each.node_id)]
    return sorted(found, key=lambda each: (each.rtt_ns == 0, each.rtt_ns, each.node))


def check_service(name: str) -> str:
    """The name of a service. :raises UsageError: it cannot be one."""
    return check_name(name, "service", error=UsageError)


def _check(name: str, endpoint: str, port: int, *, least: int) -> None:
    check_service(name)
    if not least <= port <= 65535:
        raise UsageError(f"a port is a number from {least} to 65535, not {port}")
    split_endpoint(endpoint, error=UsageError)
