"""Errors as JSON: `{"code", "message", "hint"}`, the same on every interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomirror.errors import GeomirrorError, all_errors


def error_word(error: GeomirrorError | type[GeomirrorError]) -> str:
    """Stable word for an error class: `NotFoundError` → `not_found`; the base class is `error`."""
    kind = error if isinstance(error, type) else type(error)
    if kind is GeomirrorError:
        return "error"
    name = kind.__name__.removesuffix("Error")
    word = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return word.lstrip("_")


def error_object(error: GeomirrorError) -> dict[str, Any]:
    """The JSON object of an error."""
    return {"code": error_word(error), "message": error.message, "hint": error.hint}


def error_from_object(found: Mapping[str, Any]) -> GeomirrorError:
    """Rebuild an error from its JSON object; an unknown word gives the base class."""
    message, hint = str(found.get("message", "no message")), str(found.get("hint", ""))
    for kind in all_errors():
        if error_word(kind) == found.get("code"):
            return kind(message, hint=hint)
    return GeomirrorError(message, hint=hint)
