"""Answers to requests that never reach an export.

Refusals, requests of length 0 and CACHE need no export; BLOCK_STATUS asks it synchronously.
"""

from __future__ import annotations

from geomirror.errors import GeomirrorError
from geomirror.nbd import structured
from geomirror.nbd.constants import CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, CMD_READ
from geomirror.nbd.protocol import Export, Request


def answer_aside(request: Request, error: int, export: Export, is_structured: bool) -> bytes:
    """The complete reply to one of `RequestParser.asides`."""
    if error and is_structured:
        return structured.error_chunk(request.cookie, error, _refusal_text(request, export))
    if error:
        return structured.simple_error(request.cookie, error)
    if request.command == CMD_BLOCK_STATUS:
        return _block_status(request, export)
    if request.command == CMD_READ and is_structured:
        return structured.empty_chunk(request.cookie)
    return structured.success_reply(request.cookie)


def _refusal_text(request: Request, export: Export) -> str:
    """One line for people; the errno says which rule it was."""
    return (
        f'export "{export.name}" refuses command {request.command} flags {request.flags:#x} '
        f"at {request.offset}+{request.length}"
    )


def _block_status(request: Request, export: Export) -> bytes:
    is_one = bool(request.flags & CMD_FLAG_REQ_ONE)
    try:
        extents = export.block_status(request.offset, request.length)
    except GeomirrorError as error:
        return structured.error_chunk(request.cookie, error.nbd_errno, str(error))
    return structured.block_status_chunk(
        request.cookie, structured.fit_extents(extents, request.length, is_one=is_one)
    )
