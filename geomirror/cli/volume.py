"""`geomirror volume add|resize`: volumes of a resource while it is in use."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app
from geomirror.cli.units import format_bytes, parse_size
from geomirror.errors import UsageError

TIMEOUT_S = 90


@click.group()
def volume() -> None:
    """Add and grow volumes while writers go on."""


@volume.command()
@click.argument("resource", metavar="RES")
@click.option(
    "--size", "size_bytes", required=True, type=parse_size, metavar="SIZE", help="Like 10G."
)
@click.option("--name", metavar="NAME", help="Default: its number: 1, 2, …")
@click.option(
    "--backing",
    "backings",
    multiple=True,
    metavar="NODE=PATH",
    help="File or block device under it on a node. Default: a file in the data directory.",
)
@click.option("--force", is_flag=True, help="Overwrite a backing device that holds data.")
@json_option
@pass_app
def add(
    app: App,
    resource: str,
    size_bytes: int,
    name: str | None,
    backings: tuple[str, ...],
    force: bool,
) -> None:
    """Add a volume to a resource: it shares the journal, the order and the stream.

    Answers when it is served at the primary and can never be lost again; the secondaries have it
    from the epoch on that adds it.

    \b
    [bold]Examples:[/bold]
      geomirror volume add pg --size 10G
      geomirror volume add pg --size 10G --name wal --backing east-1=/dev/vg0/wal
    """
    parameters = {
        "name": resource,
        "volume": name,
        "size_bytes": size_bytes,
        "backings": _paths(backings),
        "is_forced": force,
    }
    result = app.call("volume.add", parameters, timeout_s=TIMEOUT_S)
    app.show(result, lambda: _said(result, "is served"))


@volume.command()
@click.argument("what", metavar="RES[/VOLUME]")
@click.option(
    "--size", "size_bytes", required=True, type=parse_size, metavar="SIZE", help="Its new size."
)
@json_option
@pass_app
def resize(app: App, what: str, size_bytes: int) -> None:
    """Grow a volume; without its name, the first one.

    Clients see the new size when they connect again. A backing file is extended, a backing device
    has to be large enough. Volumes cannot be shrunk.

    \b
    [bold]Example:[/bold]
      geomirror volume resize pg/0 --size 20G
    """
    resource, _, name = what.partition("/")
    parameters = {"name": resource, "volume": name or None, "size_bytes": size_bytes}
    result = app.call("volume.resize", parameters, timeout_s=TIMEOUT_S)
    text = "has its new size" if result["changed"] else "has that size already"
    app.show(result, lambda: _said(result, text))


def _paths(texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        node, separator, path = text.partition("=")
        if not separator or not node or "/" in node or not path.startswith("/"):
            raise UsageError(f"--backing {text}: write NODE=/ABSOLUTE/PATH")
        if node in found:
            raise UsageError(f"--backing {text}: {node} was given already")
        found[node] = path
    return found


def _said(result: dict[str, Any], text: str) -> str:
    volume = result["volume"]
    size = format_bytes(volume["size_bytes"])
    lines = [f'volume "{result["name"]}/{volume["name"]}" of {size} {text}', volume["nbd_uri"]]
    if result["pending"]:
        lines.append(f"pending: {', '.join(result['pending'])}; they follow with the stream")
    return "\n".join(lines)
