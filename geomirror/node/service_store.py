"""`services.json`: what this node exposes and forwards (docs/disk_format.md)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from geomirror.errors import IntegrityError, RefusedError, UsageError
from geomirror.limits import Limits
from geomirror.node.json_file import load_json, require_format
from geomirror.node.paths import write_file_atomic
from geomirror.tunnel.service_rules import Exposure, Forward, ServiceRules

FORMAT = 1
_RESTORE = "restore it, or move it away and expose and forward anew"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    exposures: list[Exposure] = []
    forwards: list[Forward] = []


class ServiceStore:
    """The rules in force; a change is durable before it returns."""

    def __init__(self, path: Path, limits: Limits) -> None:
        """Load the file; an absent one is empty.

        :raises IntegrityError: it is not what this version writes.
        """
        self._path = path
        self.rules = ServiceRules(limits)
        found = load_json(path, _File, _RESTORE)
        if found is None:
            return
        require_format(path, found.format, FORMAT)
        try:
            for exposure in found.exposures:
                self.rules = self.rules.with_exposure(exposure)
            for forward in found.forwards:
                self.rules = self.rules.with_forward(forward)
        except (UsageError, RefusedError) as error:
            raise IntegrityError(f"{path} is damaged: {error.message}", hint=_RESTORE) from error

    def save(self, rules: ServiceRules) -> None:
        """These rules are in force from now on; durable at return.

        :raises StorageError: nothing changed, neither on disk nor here.
        """
        file = _File(FORMAT, list(rules.exposures.values()), list(rules.forwards.values()))
        write_file_atomic(self._path, msgspec.json.format(msgspec.json.encode(file), indent=1))
        self.rules = rules
