"""Reading the JSON files of a node: one place that knows all the ways in which that fails."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from geomirror.errors import IntegrityError, StorageError

T = TypeVar("T")


def load_json(path: Path, kind: type[T], hint: str) -> T | None:
    """A file's document; None when there is no file.

    :param hint: what to do when it is damaged.
    :raises StorageError: it cannot be read.
    :raises IntegrityError: it is not JSON, or not of this kind.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError.from_os(error, operation="read", path=str(path)) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # Not UTF-8 is a ValueError, deep nesting a RecursionError.
        raise IntegrityError(f"{path} is damaged: {error}", hint=hint) from error


def require_format(path: Path, found: int, known: int) -> None:
    """:raises IntegrityError: a version of geomirror wrote the file that this one does not know."""
    if found != known:
        raise IntegrityError(
            f"{path} has format {found}, this version knows {known}",
            hint="install the version of geomirror that wrote it",
        )
