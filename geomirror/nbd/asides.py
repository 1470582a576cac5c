"""Answers to requests that never reach an export.

Refusals, requests of length 0 and CACHE need no export. (`status_desk` answers BLOCK_STATUS.)
"""

from __future__ import annotations

from geomirror.nbd import structured
from geomirror.nbd.constants import CMD_READ
from geomirror.nbd.protocol import Export, Request


def answer_aside(request: Request, error: int, export: Export, is_structured: bool) -> bytes:
    """The complete reply to one of `RequestParser.asides`."""
    if error and is_structured:
        return structured.error_chunk(request.cookie, error, _refusal_text(request, export))
    if error:
        return structured.simple_error(request.cookie, error)
    if request.command == CMD_READ and is_structured:
        return structured.empty_chunk(request.cookie)
    return structured.success_reply(request.cookie)


def _refusal_text(request: Request, export: Export) -> str:
    """One line for people; the errno says which rule it was."""
    return (
        f'export "{export.name}" refuses command {request.command} flags {request.flags:#x} '
        f"at {request.offset}+{request.length}"
    )
