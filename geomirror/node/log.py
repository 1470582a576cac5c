"""Structured logs on stderr: JSON lines, or colours on a terminal. Secrets never go in."""

from __future__ import annotations

import logging
import sys

import structlog

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class LogLevel:
    """The level in force; changed at SIGHUP without a new set-up."""

    number = _LEVELS["info"]


def set_level(level: str) -> None:
    """Take over a level: debug, info, warning or error."""
    LogLevel.number = _LEVELS[level]
    logging.getLogger().setLevel(LogLevel.number)


def is_debugging() -> bool:
    """Whether lines of level debug are written; asked before making them costs anything."""
    return LogLevel.number <= _LEVELS["debug"]


def _drop_below_level(
    _logger: object, method: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    if _LEVELS.get(method, 40) < LogLevel.number:
        raise structlog.DropEvent
    return event


def set_up_logging(level: str, style: str, node: str) -> None:
    """Configure structlog and route the standard library's loggers (asyncio, aiohttp) through it.

    :param style: json, console, or auto: console on a terminal.
    :param node: name in every JSON line.
    """
    is_console = style == "console" or (style == "auto" and sys.stderr.isatty())

    def add_node(
        _logger: object, _method: str, event: structlog.types.EventDict
    ) -> structlog.types.EventDict:
        event["node"] = node
        return event

    shared: list[structlog.types.Processor] = [
        _drop_below_level,
        add_node,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    tail: list[structlog.types.Processor]
    if is_console:
        tail = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    else:
        # Without local variables: they may hold tokens and keys.
        traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        tail = [
            structlog.processors.ExceptionRenderer(traceback),
            structlog.processors.JSONRenderer(),
        ]
    structlog.configure(
        processors=[*shared, *tail],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], force=True)
    set_level(level)


class _ToStructlog(logging.Handler):
    """Forwards the standard library's records."""

    def emit(self, record: logging.LogRecord) -> None:
        method = record.levelname.lower()
        write = getattr(structlog.get_logger(), method if method in _LEVELS else "error")
        error = record.exc_info if record.exc_info and record.exc_info[0] else None
        if error:
            write(record.getMessage(), logger=record.name, exc_info=error)
        else:
            write(record.getMessage(), logger=record.name)
