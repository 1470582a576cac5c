"""Parameters of the methods about resources."""

from __future__ import annotations

from typing import Literal

import msgspec

from geomirror.node.calls import Parameters
from geomirror.node.resource_definition import ResourceDefinition


class Create(Parameters, frozen=True):
    """`resource create`"""

    name: str
    primary: str
    secondaries: list[str] = msgspec.field(default_factory=list)
    sizes: list[int] = msgspec.field(default_factory=list)
    """Bytes of volumes 0, 1, …; empty: the size of the primary's backing device."""
    backings: dict[str, dict[str, str]] = msgspec.field(default_factory=dict)
    adopt: str | None = None
    journal_bytes: int | None = None
    is_forced: bool = False
    settings: dict[str, str] = msgspec.field(default_factory=dict)


class SetSettings(Parameters, frozen=True):
    """`resource set`"""

    name: str
    settings: dict[str, str]
    """New values; "" takes a setting back to its default."""
    is_forced: bool = False
    """Do not wait for members that rely on the settings before."""


class AddSecondary(Parameters, frozen=True):
    """`resource add-secondary`"""

    name: str
    node: str
    backings: dict[str, str] = msgspec.field(default_factory=dict)
    """Volume name -> absolute path there."""
    is_forced: bool = False


class RemoveSecondary(Parameters, frozen=True):
    """`resource remove-secondary`"""

    name: str
    node: str
    keep_data: bool = False


class CheckBacking(Parameters, frozen=True):
    """Asked of a secondary before a resource is made."""

    paths: dict[str, str]
    sizes: dict[str, int]
    is_forced: bool


class Define(Parameters, frozen=True):
    """A primary brings a definition."""

    definition: ResourceDefinition
    is_forced: bool = False


class Forget(Parameters, frozen=True):
    """A primary tells that a resource is deleted."""

    name: str
    resource_id: str
    keep_data: bool = False


class Name(Parameters, frozen=True):
    """A resource."""

    name: str


class Delete(Parameters, frozen=True):
    """`resource delete`"""

    name: str
    keep_data: bool = False


class ForPeer(Parameters, frozen=True):
    """`pause` and `resume`"""

    name: str
    peer: str | None = None


class Wait(Parameters, frozen=True):
    """`wait`"""

    name: str
    kind: Literal["durable", "applied"] = "durable"
    timeout_s: float = 3600.0
