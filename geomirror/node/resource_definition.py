"""What a resource *is*, as its members agree on it: the state that `resource create` makes.

The primary owns the definition and pushes it to the secondaries; a member replaces its copy only
by one of a higher version.
"""

from __future__ import annotations

import re

import msgspec

from geomirror.errors import UsageError
from geomirror.limits import GIB, PRODUCTION, SECTOR_BYTES, Limits
from geomirror.wan_protocol.sync_policy import parse_policy

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
"""Names of resources, nodes and sites: safe in a path, in a URI and in a metric label."""


TOKEN_SHIFT = 32
"""Versions of a definition count up from the fencing token of their primary, shifted by this."""


class VolumeDefinition(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One volume of a resource."""

    index: int
    name: str
    size_bytes: int
    first_size_bytes: int | None = None
    """At epoch 0, where that differs: the volume has grown, or was added (0)."""

    @property
    def bytes_at_first(self) -> int:
        """Size at epoch 0: a copy that is new begins with it."""
        return self.size_bytes if self.first_size_bytes is None else self.first_size_bytes


class ResourceDefinition(msgspec.Struct, forbid_unknown_fields=True):
    """One resource: identity, volumes, members and settings."""

    name: str
    resource_id: str
    """16 bytes in hexadecimal, never reused: a name created again is another resource."""
    version: int
    """Grows with every change; the highest version wins."""
    primary: str
    secondaries: list[str]
    volumes: list[VolumeDefinition]
    backings: dict[str, dict[str, str]] = {}
    """node -> volume name -> absolute path; a volume that is absent lies in the data directory."""
    adopt: str | None = None
    """Node whose backing holds data to be kept and sent; None when the resource starts as zeros."""
    journal_bytes: int | None = None
    """None: each node takes its own default: 1–64 GiB, half of the free space at most."""
    settings: dict[str, str] = {}
    """See `wan_protocol/sync_policy.py`."""

    @property
    def identity(self) -> bytes:
        """The 16 bytes of `resource_id`."""
        return bytes.fromhex(self.resource_id)

    @property
    def session(self) -> int:
        """Number of this resource's session on every link: never 0, equal on both sides."""
        return int.from_bytes(self.identity[:4], "little") or 1

    @property
    def members(self) -> list[str]:
        """Primary first, then the secondaries in order."""
        return [self.primary, *self.secondaries]

    @property
    def size_bytes(self) -> int:
        """Sum of the volumes' sizes."""
        return sum(volume.size_bytes for volume in self.volumes)

    def peers_of(self, node: str) -> list[str]:
        """The other members: any of them may be the primary by now, or become it."""
        return [name for name in self.members if name != node]

    def with_primary(self, node: str, token: int) -> ResourceDefinition:
        """The definition after a promotion of a member.

        Two primaries that do not know of each other both change it: the one with the higher
        fencing token wins, which is therefore the upper half of the version.
        """
        settings = dict(self.settings)
        own = settings.pop(f"ack.{node}", None)
        if own is not None and f"ack.{self.primary}" not in settings:
            settings[f"ack.{self.primary}"] = own
        return msgspec.structs.replace(
            self,
            version=max(self.version + 1, token << TOKEN_SHIFT),
            primary=node,
            secondaries=[self.primary if name == node else name for name in self.secondaries],
            settings=settings,
        )

    def backing_path(self, node: str, volume: str) -> str | None:
        """Path of the backing device, or None for a file in the data directory."""
        return self.backings.get(node, {}).get(volume)

    def validate(self) -> None:
        """Check everything that types cannot say.

        :raises UsageError: a bad name, size, id, or a member named twice.
        """
        check_name("resource", self.name)
        if not re.fullmatch(r"[0-9a-f]{32}", self.resource_id):
            raise UsageError(f'resource "{self.name}": id is not 32 hexadecimal digits')
        if len(set(self.members)) != len(self.members):
            raise UsageError(f'resource "{self.name}": a node is named twice among its members')
        if len(self.members) > PRODUCTION.peers_max:
            raise UsageError(f'resource "{self.name}": over {PRODUCTION.peers_max} members')
        if not 1 <= len(self.volumes) <= PRODUCTION.volumes_max:
            raise UsageError(f'resource "{self.name}": 1 to {PRODUCTION.volumes_max} volumes')
        if [volume.index for volume in self.volumes] != list(range(len(self.volumes))):
            raise UsageError(f'resource "{self.name}": volumes are not numbered from 0')
        for member in self.members:
            check_name("node", member)
        parse_policy(self.settings, self.secondaries)
        for volume in self.volumes:
            check_name("volume", volume.name)
            check_volume_size(f"{self.name}/{volume.name}", volume.size_bytes)
            if not 0 <= volume.bytes_at_first <= volume.size_bytes:
                raise UsageError(f'resource "{self.name}": volume {volume.name} has shrunk')


def check_name(kind: str, name: str) -> None:
    """Refuse a name that would not be safe as a file name.

    :raises UsageError: not 1–63 of A-Z a-z 0-9 _ . -, or not beginning with a letter or digit.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(
            f"{kind} name {name!r} is not allowed",
            hint="use 1 to 63 of A-Z a-z 0-9 _ . - and begin with a letter or digit",
        )


def check_volume_size(name: str, size_bytes: int) -> None:
    """Refuse a size that is not a positive multiple of a sector, or over the limit.

    :raises UsageError: the size is not possible.
    """
    if size_bytes <= 0 or size_bytes % SECTOR_BYTES:
        raise UsageError(f"volume {name}: size {size_bytes} is not a multiple of {SECTOR_BYTES}")
    if size_bytes > PRODUCTION.volume_bytes_max:
        raise UsageError(f"volume {name}: over {PRODUCTION.volume_bytes_max} bytes")


def default_journal_bytes(size_bytes: int, free_bytes: int, limits: Limits) -> int:
    """Journal size when none is asked for: the volumes' size within 1–64 GiB, half of the free
    space at most, and never under the smallest journal that works.
    """
    wanted = min(max(size_bytes, GIB), 64 * GIB)
    bounded = max(min(wanted, free_bytes // 2), limits.journal_bytes_min)
    return bounded - bounded % limits.segment_bytes
