"""`geomirror branch list|view|export|drop`: what a rollback cut off."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table, yes_option
from geomirror.cli.timeline import local
from geomirror.cli.units import format_bytes, parse_duration
from geomirror.errors import RefusedError, StorageError

_BLOCK = 4096
_ZEROS = bytes(_BLOCK)
_PROGRESS_BYTES = 64 << 20


@click.group()
def branch() -> None:
    """Look at what was cut off when a copy went back to an earlier point.

    A branch is never dropped by itself.
    """


@branch.command("list")
@click.argument("name", metavar="RES")
@click.option("--node", metavar="NODE", help="On this member. Default: the one here.")
@json_option
@pass_app
def list_branches(app: App, name: str, node: str | None) -> None:
    """List the branches of RES, and what they cost."""
    result = app.call("branch.list", {"name": name, "node": node})
    app.show(result, lambda: _table(result))


@branch.command()
@click.argument("name", metavar="RES")
@click.argument("branch_name", metavar="NAME")
@click.option("--node", metavar="NODE", help="On this member. Default: the one here.")
@click.option("--expires", metavar="TIME", help="End the view after this time, for example 4h.")
@json_option
@pass_app
def view(app: App, name: str, branch_name: str, node: str | None, expires: str | None) -> None:
    """Make a read-only view of RES as it was at the end of a branch, and print its NBD URI.

    `geomirror view list` shows it, `geomirror view delete` ends it.
    """
    result = _make_view(app, name, branch_name, node, expires)
    app.progress(f'view "{result["name"]}" of branch "{branch_name}" on {result["node"]}')
    app.show(result, "\n".join(volume["nbd_uri"] for volume in result["volumes"]))


@branch.command()
@click.argument("name", metavar="RES")
@click.argument("branch_name", metavar="NAME")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--volume", default="0", show_default=True, metavar="VOLUME", help="Of RES.")
@json_option
@pass_app
def export(app: App, name: str, branch_name: str, file: Path, volume: str) -> None:
    """Write RES as it was at the end of a branch to FILE, a sparse raw image.

    The branch has to be on the node here. A file that is there is never overwritten.
    """
    descriptor = _create(file)
    is_done = False
    try:
        made = _make_view(app, name, branch_name, None, "24h")
        try:
            uris = {each["name"]: each["nbd_uri"] for each in made["volumes"]}
            if volume not in uris:
                raise RefusedError(f'"{name}" has no volume "{volume}": {", ".join(uris)}')
            size, data = asyncio.run(_copy(app, uris[volume], descriptor, str(file)))
            is_done = True
        finally:
            app.call("view.delete", {"name": name, "view": made["name"]})
    finally:
        os.close(descriptor)
        if not is_done:
            file.unlink(missing_ok=True)
    result = {"resource": name, "branch": branch_name, "volume": volume, "file": str(file)}
    text = f'branch "{branch_name}" of "{name}" is in {file}: {format_bytes(size)}, '
    app.show(
        {**result, "size_bytes": size, "data_bytes": data}, text + f"{format_bytes(data)} of data"
    )


@branch.command()
@click.argument("name", metavar="RES")
@click.argument("branch_name", metavar="NAME")
@click.option("--node", metavar="NODE", help="On this member. Default: the one here.")
@yes_option
@json_option
@pass_app
def drop(app: App, name: str, branch_name: str, node: str | None, yes: bool) -> None:
    """Forget a branch. What is only in it is lost."""
    question = f'drop branch "{branch_name}" of "{name}" and all that is only in it'
    app.confirm(question, is_confirmed=yes)
    parameters = {"name": name, "branch": branch_name, "node": node}
    result = app.call("branch.drop", parameters)
    app.show(result, f'branch "{branch_name}" of "{name}" is dropped')


def _make_view(
    app: App, name: str, branch_name: str, node: str | None, expires: str | None
) -> dict[str, Any]:
    parameters = {
        "name": name,
        "branch": branch_name,
        "node": node,
        "expires_s": None if expires is None else parse_duration(expires),
    }
    return app.call("branch.view", parameters, timeout_s=90)


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise RefusedError(
            f"{path} is there already", hint="name a file that is not there yet"
        ) from None
    except OSError as error:
        raise StorageError.from_os(error, operation="create", path=str(path)) from error


async def _copy(app: App, uri: str, descriptor: int, name: str) -> tuple[int, int]:
    """Copy an export to a new file; (size, bytes of data)."""
    from geomirror.nbd.client_io import NbdClient

    data_bytes = told = 0
    async with await NbdClient.connect(uri) as client:
        size = client.size_bytes
        try:
            os.ftruncate(descriptor, size)
            async for offset, content in client.chunks():
                data_bytes += _write_data(descriptor, content, offset)
                if offset + len(content) - told >= _PROGRESS_BYTES:
                    told = offset + len(content)
                    app.progress(f"{format_bytes(told)} of {format_bytes(size)}")
            os.fsync(descriptor)
        except OSError as error:
            raise StorageError.from_os(error, operation="write", path=name) from error
    return size, data_bytes


def _write_data(descriptor: int, content: bytearray, offset: int) -> int:
    """Write the blocks that are not all zeros, adjacent ones at once; bytes written."""
    written = start = 0
    view = memoryview(content)
    for at in range(0, len(content) + _BLOCK, _BLOCK):
        block = content[at : at + _BLOCK]
        if block and block != _ZEROS[: len(block)]:
            continue
        done = start
        while done < min(at, len(content)):
            done += os.pwrite(descriptor, view[done : min(at, len(content))], offset + done)
        written += max(min(at, len(content)) - start, 0)
        start = at + _BLOCK
    return written


def _table(result: dict[str, Any]) -> str:
    if not result["branches"] and not result["damaged"]:
        return f'"{result["resource"]}" has no branches here'
    rows = [
        [
            each["name"],
            str(each["base"]["epoch"]),
            str(each["end"]["epoch"]),
            local(each["end"]["time"]) if each["end"]["time"] else "-",
            format_bytes(each["stored_bytes"]),
            local(each["created_at"]),
            "yes" if each["is_viewable"] else "no: history does not reach back to its base",
        ]
        for each in result["branches"]
    ]
    rows += [[name, *["-"] * 5, "no: damaged"] for name in result["damaged"]]
    headings = ["BRANCH", "FROM EPOCH", "TO EPOCH", "END", "STORED", "CUT OFF AT", "VIEWABLE"]
    lines = [table(headings, rows)]
    stored, budget = format_bytes(result["stored_bytes"]), format_bytes(result["budget_bytes"])
    lines.append(f"{stored} of {budget}")
    if result["alarm"]:
        lines.append(result["alarm"])
    return "\n".join(lines)
