"""`geomirror drill`: tries whether a copy can be used, and remembers what came of it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, refuse_others, table
from geomirror.cli.timeline import local
from geomirror.cli.units import format_seconds, parse_duration, parse_size
from geomirror.cli.when import WHEN_HELP, parse_when
from geomirror.errors import GeomirrorError, RefusedError, UnreachableError, UsageError

TIMEOUT, QUOTA = "1h", "10G"
EXIT_FAILED, EXIT_LATE, EXIT_INTERRUPTED = 1, 6, 130
RECORD_S_MAX = 60.0
"""A daemon that is away when a drill ends is waited for."""


@click.command()
@click.argument("name", metavar="RES")
@click.option("--check", "check", metavar="CMD", help="The shell command that tries it.")
@click.option("--at", "when", metavar="T", help=f"{WHEN_HELP} Default: the newest.")
@click.option(
    "--node",
    metavar="NODE",
    help="The copy on this member, over NBD by TCP; CMD runs here. Default: the one here.",
)
@click.option("--volume", metavar="VOLUME", help="The one to mount. Default: the first.")
@click.option("--no-mount", is_flag=True, help="For a check that wants no mounted file system.")
@click.option("--timeout", "timeout", metavar="TIME", help=f"Of the check. Default: {TIMEOUT}.")
@click.option(
    "--quota",
    metavar="SIZE",
    help=f"Most that may be written, for the drill's time only; then ENOSPC. Default: {QUOTA}.",
)
@click.option("--history", "is_history", is_flag=True, help="Show earlier drills of this copy.")
@json_option
@pass_app
def drill(
    app: App,
    name: str,
    check: str | None,
    when: str | None,
    node: str | None,
    volume: str | None,
    no_mount: bool,
    timeout: str | None,
    quota: str | None,
    is_history: bool,
) -> int:
    """Try whether a copy of RES can be used: make a view, run CMD against it, remember the result.

    CMD runs here, as you, and passes with exit code 0. The view is writable, and gone afterwards.
    Its environment has GEOMIRROR_URI (NBD), GEOMIRROR_URIS (all volumes, one a line),
    GEOMIRROR_EPOCH, GEOMIRROR_TIME, GEOMIRROR_RESOURCE and GEOMIRROR_NODE; for root
    GEOMIRROR_FILE, the volume as a file, and GEOMIRROR_MOUNT, if it has a file system. Exits 0
    passed, 1 failed, 6 too slow, else as view create. `status` says when the last one passed.

    \b
    [bold]Examples:[/bold]
      geomirror drill pg --check 'test -s "$GEOMIRROR_MOUNT/pgdata/PG_VERSION"'
      geomirror drill pg --no-mount --check 'e2fsck -fy "$GEOMIRROR_FILE"; test $? -le 1'
      geomirror drill pg --at -1h --check 'qemu-img check "$GEOMIRROR_URI"'
      geomirror drill pg --history
    """
    if is_history:
        given = {"check": check, "at": when, "volume": volume, "timeout": timeout, "quota": quota}
        return _history(app, name, node, {**given, "no-mount": no_mount})
    if not check:
        hint = f"geomirror drill {name} --check 'ls \"$GEOMIRROR_MOUNT\"'"
        raise UsageError("a drill needs a command that tries the copy", hint=hint)
    parameters: dict[str, Any] = {"name": name, "node": node, "check": check}
    parameters |= {
        "timeout_s": parse_duration(timeout or TIMEOUT),
        "quota_bytes": parse_size(quota or QUOTA),
    }
    if when is not None:
        parameters |= parse_when(when, datetime.now().astimezone())
    done, exit_code = _drill(app, parameters, volume, mounts=not no_mount)
    app.show(done, lambda: _words(done["drill"], name))
    return exit_code


def _history(app: App, name: str, node: str | None, given: Mapping[str, object]) -> int:
    """Show earlier drills. :raises UsageError: `given` has options that are of a new one."""
    refuse_others("--history", given, "it runs no drill", f"geomirror drill {name} --history")
    listed = app.call("drill.list", {"name": name, "node": node})
    app.show(listed, lambda: _table(listed))
    return 0


def _drill(
    app: App, parameters: dict[str, Any], volume: str | None, *, mounts: bool
) -> tuple[dict[str, Any], int]:
    """The whole drill; its record and the exit code."""
    from geomirror.cli.drill_run import Trial, only_drill, try_out, wait_readable

    name, node = parameters["name"], parameters["node"]
    app.call("resource.show", {"name": name})
    with only_drill(app.data_dir, name), _interruptible():
        began = time.monotonic()
        begun = app.call("drill.begin", parameters, timeout_s=90)
        said: dict[str, Any] = {"name": name, "number": begun["number"], "node": node}
        try:
            view = begun["view"]
            uris = _uris(view, begun["node"], app.call("status")["node"])
            uri = _pick(uris, volume, name)
            wait_readable(uri)
            said["rto_seconds"] = round(time.monotonic() - began, 3)
            app.progress(f"epoch {view['epoch']}, {local(view['time'])}: {uri}")
            environment = {
                "GEOMIRROR_URI": uri,
                "GEOMIRROR_URIS": "\n".join(uris.values()),
                "GEOMIRROR_EPOCH": str(view["epoch"]),
                "GEOMIRROR_TIME": view["time"],
                "GEOMIRROR_RESOURCE": name,
                "GEOMIRROR_NODE": begun["node"],
            }
            check, timeout_s = parameters["check"], parameters["timeout_s"]
            trial = Trial(uri, volume or next(iter(uris)), check, timeout_s, mounts, environment)
            outcome = try_out(app.data_dir, trial, _say)
            said |= {
                "file_system": outcome.file_system,
                "mount_reason": outcome.mount_reason,
                "exit_code": outcome.exit_code,
                "seconds": outcome.seconds,
                "output": outcome.output,
            }
            if outcome.mounted_at is not None:
                said["mount_seconds"] = round(outcome.mounted_at - began, 3)
            said["result"], said["reason"], exit_code = _judged(outcome, timeout_s)
        except BaseException as error:
            is_ours = isinstance(error, GeomirrorError)
            said["result"] = "error" if is_ours else "interrupted"
            said["reason"] = str(error)[:1000] if is_ours else "the command was interrupted"
            _record(app, said)
            raise
        return _record(app, said), exit_code


def _judged(outcome: Any, timeout_s: float) -> tuple[str, str, int]:
    """Result, reason and exit code."""
    if outcome.is_late:
        return "timeout", f"the check took longer than {timeout_s:g} s", EXIT_LATE
    code = outcome.exit_code
    if code is None:
        return "failed", "the process that ran the check was killed", EXIT_FAILED
    if code == 0:
        return "passed", "", 0
    why = f"exit code {code}" if code > 0 else f"signal {-code}"
    return "failed", why, EXIT_FAILED


def _uris(view: dict[str, Any], there: str, here: str) -> dict[str, str]:
    """URI of each volume that can be reached from here. :raises RefusedError: there is none."""
    key = "nbd_uri" if there == here else "nbd_tcp_uri"
    found = {each["name"]: each[key] for each in view["volumes"] if each.get(key)}
    if not found:
        raise RefusedError(
            f"{there} serves no NBD over TCP, so that its views can be used only there",
            hint=f"run the drill on {there}",
        )
    if any(uri.startswith("nbds") for uri in found.values()):
        raise RefusedError(f"{there} serves NBD with TLS only", hint=f"run the drill on {there}")
    return found


def _pick(uris: dict[str, str], volume: str | None, name: str) -> str:
    if volume is None:
        return next(iter(uris.values()))
    if volume not in uris:
        raise UsageError(f'"{name}" has no volume "{volume}"', hint=f"it has {', '.join(uris)}")
    return uris[volume]


def _record(app: App, said: dict[str, Any]) -> dict[str, Any]:
    """Make the result durable; the view goes with it. A restarting daemon is waited for.

    :raises GeomirrorError: it could not be recorded; says what the result was.
    """
    give_up = time.monotonic() + RECORD_S_MAX
    while True:
        try:
            return app.call("drill.end", said, timeout_s=60)
        except UnreachableError as error:
            if time.monotonic() < give_up:
                time.sleep(0.5)
                continue
            text = f"the drill's result ({said['result']}) is not recorded: {error.message}"
            raise UnreachableError(text, hint="its view expires by itself") from error


def _say(part: bytes) -> None:
    sys.stderr.buffer.write(part)
    sys.stderr.buffer.flush()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end a drill as Ctrl-C does: the result is recorded."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _words(found: dict[str, Any], name: str) -> str:
    why = f": {found['reason']}" if found["reason"] else ""
    lines = [f'drill of "{name}" on {found["node"]} {found["result"]}{why}']
    lines.append(f"  epoch {found['epoch']}, {local(found['time'])}")
    if found["rto_seconds"] is not None:
        text = f"  usable after {format_seconds(found['rto_seconds'])}"
        if found["file_system"]:
            mounted = format_seconds(found["mount_seconds"])
            text += f", {found['file_system']} mounted after {mounted}"
        lines.append(text + f"; the check took {format_seconds(found['seconds'])}")
    if found["mount_reason"]:
        lines.append(f"  not mounted: {found['mount_reason']}")
    return "\n".join(lines)


def _table(listed: dict[str, Any]) -> str:
    if not listed["drills"]:
        return f'no drill of "{listed["name"]}" on {listed["node"]}'
    rows = [
        [
            str(each["number"]),
            local(each["started_at"]),
            each["result"],
            str(each["epoch"] or "-"),
            format_seconds(each["rto_seconds"]),
            format_seconds(each["seconds"]),
            each["file_system"] or "-",
            each["reason"] or each["check"][:40],
        ]
        for each in reversed(listed["drills"])
    ]
    heads = ["DRILL", "STARTED", "RESULT", "EPOCH", "USABLE AFTER", "CHECK", "MOUNTED", "WHAT"]
    return table(heads, rows)
