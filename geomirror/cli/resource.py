"""`geomirror resource create|list|show|delete`; changes are in `resource_changes`."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table, yes_option
from geomirror.cli.units import parse_size
from geomirror.errors import UsageError


@click.group()
def resource() -> None:
    """Create, list, show, change and delete replicated resources."""


@resource.command()
@click.argument("name", metavar="RES")
@click.option(
    "--size",
    "sizes",
    type=parse_size,
    multiple=True,
    metavar="SIZE",
    help="Size of the volume, like 10G; given again: of volumes 1, 2, … "
    "Default: the size of the primary's backing device.",
)
@click.option("--primary", required=True, metavar="NODE", help="Node where it is written.")
@click.option(
    "--secondary",
    "secondaries",
    multiple=True,
    metavar="NODE",
    help="Node that follows; may be given more than once, and may be away now.",
)
@click.option(
    "--backing",
    "backings",
    multiple=True,
    metavar="NODE[/VOLUME]=PATH",
    help="File or block device under a volume on a node. Default: a file in the data directory.",
)
@click.option("--adopt", metavar="NODE", help="Keep and send what that node's backing holds.")
@click.option(
    "--journal-size",
    "journal_bytes",
    type=parse_size,
    metavar="SIZE",
    help="Default: the volumes' size, 1G to 64G, at most half of the free space.",
)
@click.option(
    "--ack",
    "acks",
    multiple=True,
    metavar="[NODE=]LEVEL",
    help="What FLUSH and FUA wait for at the secondaries, or at one of them: completed (nothing, "
    "the default), received, durable or applied.",
)
@click.option(
    "--copies",
    metavar="K|all",
    help="How many of the secondaries waited for must have it. Default: all that are in sync.",
)
@click.option(
    "--degrade-after",
    metavar="SECONDS|block",
    help="A secondary that keeps a flush waiting for so long is waited for no more, until it has "
    "caught up; block: for ever. Default: 5s.",
)
@click.option(
    "--auto-rejoin",
    type=click.Choice(["on", "off"]),
    help="Whether a member that comes back with epochs that the promoted copy lacks saves them as "
    "a branch and follows by itself. Default: off, it waits for geomirror resolve.",
)
@click.option("--force", is_flag=True, help="Overwrite a backing device that holds data.")
@json_option
@pass_app
def create(
    app: App,
    name: str,
    sizes: tuple[int, ...],
    primary: str,
    secondaries: tuple[str, ...],
    backings: tuple[str, ...],
    adopt: str | None,
    journal_bytes: int | None,
    acks: tuple[str, ...],
    copies: str | None,
    degrade_after: str | None,
    auto_rejoin: str | None,
    force: bool,
) -> None:
    """Create a resource; returns when the primary serves it.

    \b
    [bold]Examples:[/bold]
      geomirror resource create pg --size 10G --primary east-1 --secondary west-1
      geomirror resource create pg --primary east-1 --secondary west-1 \\
          --backing east-1=/dev/vg0/pg --backing west-1=/dev/vg0/pg --adopt east-1
      geomirror resource create pg --size 10G --primary east-1 --secondary west-1 --ack durable
    """
    settings = sync_settings(acks, copies, degrade_after)
    if auto_rejoin is not None:
        settings["auto_rejoin"] = auto_rejoin
    parameters = {
        "name": name,
        "sizes": list(sizes),
        "primary": primary,
        "secondaries": list(secondaries),
        "backings": parse_backings(backings),
        "adopt": adopt,
        "journal_bytes": journal_bytes,
        "is_forced": force,
        "settings": settings,
    }
    result = app.call("resource.create", parameters, timeout_s=90)
    app.show(result, lambda: _created(result))


@resource.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List the resources of which this node is a member."""
    result = app.call("resource.list")
    app.show(result, lambda: _listed(result))


@resource.command()
@click.argument("name", metavar="RES")
@json_option
@pass_app
def show(app: App, name: str) -> None:
    """Show a resource's definition."""
    result = app.call("resource.show", {"name": name})
    app.show(result, lambda: _shown(result))


@resource.command()
@click.argument("name", metavar="RES")
@click.option("--keep-data", is_flag=True, help="Leave the volumes as plain raw images.")
@yes_option
@json_option
@pass_app
def delete(app: App, name: str, keep_data: bool, yes: bool) -> None:
    """Delete a resource on all its nodes.

    Backing devices that were given with --backing stay, but without --keep-data what the journal
    still holds is not written to them. Nodes that are away delete their part when they are back.
    """
    app.call("resource.show", {"name": name})
    what = f'delete resource "{name}"' + ("" if keep_data else " and its data on all nodes")
    app.confirm(what, is_confirmed=yes)
    parameters = {"name": name, "keep_data": keep_data}
    result = app.call("resource.delete", parameters, timeout_s=600)
    app.show(result, lambda: _deleted(result))


def sync_settings(
    acks: tuple[str, ...], copies: str | None, degrade_after: str | None
) -> dict[str, str]:
    """Settings of the synchronous modes, as `resource set` names them."""
    found: dict[str, str] = {}
    for text in acks:
        node, separator, level = text.rpartition("=")
        found[f"ack.{node}" if separator else "ack"] = level
    if copies is not None:
        found["copies"] = copies
    if degrade_after is not None:
        found["degrade_after"] = degrade_after
    return found


def parse_backings(texts: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """`NODE[/VOLUME]=PATH`, each → node -> volume -> path; the volume is "0" when not named.

    :raises UsageError: not of that form, or the same volume twice.
    """
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        where, separator, path = text.partition("=")
        node, _, volume = where.partition("/")
        if not (separator and node and path.startswith("/")):
            raise UsageError(f"--backing {text}: write NODE=/ABSOLUTE/PATH")
        volumes = found.setdefault(node, {})
        if (volume or "0") in volumes:
            raise UsageError(f"--backing {text}: {where} was given already")
        volumes[volume or "0"] = path
    return found


def _created(result: dict[str, Any]) -> str:
    lines = [f'resource "{result["resource"]["name"]}" is served:']
    lines += [f"  {volume['nbd_uri']}" for volume in result["resource"]["volumes"]]
    if result["pending"]:
        nodes = ", ".join(result["pending"])
        lines.append(f"pending: {nodes}; told as soon as the link is up (geomirror link list)")
    return "\n".join(lines)


def _listed(result: dict[str, Any]) -> str:
    from geomirror.cli.units import format_bytes

    rows = [
        [
            found["name"],
            format_bytes(found["size_bytes"]),
            found["primary"],
            ",".join(found["secondaries"]) or "-",
            found["state"],
            ",".join(found["pending"]) or "-",
        ]
        for found in result["resources"]
    ]
    if not rows:
        return 'no resources; make one with "geomirror resource create"'
    return table(["RESOURCE", "SIZE", "PRIMARY", "SECONDARIES", "STATE", "PENDING"], rows)


def _shown(result: dict[str, Any]) -> str:
    from geomirror.cli.units import format_bytes

    found = result["definition"]
    lines = [
        f"resource     {found['name']} (version {found['version']}, id {found['resource_id']})",
        f"primary      {found['primary']}",
        f"secondaries  {', '.join(found['secondaries']) or 'none'}",
    ]
    for volume in found["volumes"]:
        lines.append(f"volume {volume['name']}     {format_bytes(volume['size_bytes'])}")
        for node, paths in found["backings"].items():
            if volume["name"] in paths:
                lines.append(f"  on {node}: {paths[volume['name']]}")
    if found["journal_bytes"]:
        lines.append(f"journal      {format_bytes(found['journal_bytes'])}")
    lines += [f"setting      {key} = {value}" for key, value in sorted(found["settings"].items())]
    return "\n".join(lines)


def _deleted(result: dict[str, Any]) -> str:
    lines = [f'resource "{result["name"]}" is deleted']
    lines += [f"  kept {path}" for path in result["kept"]]
    if result["pending"]:
        lines.append(f"pending: {', '.join(result['pending'])}")
    return "\n".join(lines)
