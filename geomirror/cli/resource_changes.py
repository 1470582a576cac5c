"""`geomirror resource set|add-secondary|remove-secondary`: changes while it is in use."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, yes_option
from geomirror.cli.resource import parse_backings, resource
from geomirror.errors import UsageError

PEER_SETTINGS = ("ack",)
"""What a secondary can have of its own."""


@resource.command("set")
@click.argument("name", metavar="RES")
@click.argument("pairs", metavar="KEY=VALUE…", nargs=-1, required=True)
@click.option(
    "--peer",
    metavar="NODE",
    help="Set it for this secondary only: ack=durable with it is ack.NODE=durable.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Leave degrade_after=block at once, also while a secondary is away that cannot be told: "
    "it may say of itself later that it has every confirmed write, and be wrong.",
)
@json_option
@pass_app
def set_settings(
    app: App, name: str, pairs: tuple[str, ...], peer: str | None, force: bool
) -> None:
    """Change settings of a resource while it is in use.

    `ack`, `ack.NODE` (completed, received, durable, applied), `copies` (a number or all),
    `degrade_after` (seconds or block), `auto_rejoin` (on or off: whether a member with a tail comes
    back by itself), `verify_every` (off or an interval like 7d, in which every copy is compared),
    `verify_rate` (bytes a second) and `verify_heal` (on or off). An empty value takes a setting
    back to its default.

    \b
    [bold]Examples:[/bold]
      geomirror resource set pg ack=durable degrade_after=10s
      geomirror resource set pg ack.colo=completed copies=
      geomirror resource set pg --peer colo ack=completed
      geomirror resource set pg verify_every=30d verify_rate=5M
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError(f"{pair}: write KEY=VALUE, for example ack=durable")
        settings[key if peer is None else _of_peer(key, peer)] = value
    parameters = {"name": name, "settings": settings, "is_forced": force}
    result = app.call("resource.set", parameters)
    app.show(result, lambda: _set(result))


@resource.command("add-secondary")
@click.argument("name", metavar="RES")
@click.argument("node", metavar="NODE", required=False)
@click.option("--node", "named", metavar="NODE", help="The same, as an option.")
@click.option(
    "--backing",
    "backings",
    multiple=True,
    metavar="[VOLUME=]PATH",
    help="File or block device under a volume there; without a name under volume 0. Default: a "
    "file in the data directory.",
)
@click.option("--force", is_flag=True, help="Overwrite a backing device that holds data.")
@json_option
@pass_app
def add_secondary(
    app: App,
    name: str,
    node: str | None,
    named: str | None,
    backings: tuple[str, ...],
    force: bool,
) -> None:
    """Add a secondary while writers go on; `status` shows how it is filled."""
    node = _one_node(node, named)
    texts = tuple(_named(text, node) for text in backings)
    parameters = {
        "name": name,
        "node": node,
        "backings": parse_backings(texts).get(node, {}),
        "is_forced": force,
    }
    result = app.call("resource.add_secondary", parameters, timeout_s=90)
    app.show(result, lambda: _said(result, f'"{node}" is a secondary of "{name}" now'))


@resource.command("remove-secondary")
@click.argument("name", metavar="RES")
@click.argument("node", metavar="NODE", required=False)
@click.option("--node", "named", metavar="NODE", help="The same, as an option.")
@click.option("--keep-data", is_flag=True, help="Leave its volumes there as plain raw images.")
@yes_option
@json_option
@pass_app
def remove_secondary(
    app: App, name: str, node: str | None, named: str | None, keep_data: bool, yes: bool
) -> None:
    """Remove a secondary and its copy; a node that is away forgets it when it is back."""
    node = _one_node(node, named)
    app.call("resource.show", {"name": name})
    what = f'remove the copy of "{name}" on {node}'
    app.confirm(what + (", keeping its images" if keep_data else ""), is_confirmed=yes)
    parameters = {"name": name, "node": node, "keep_data": keep_data}
    result = app.call("resource.remove_secondary", parameters, timeout_s=90)
    app.show(result, lambda: _said(result, f'"{node}" is no secondary of "{name}" any more'))


def _of_peer(key: str, peer: str) -> str:
    """:raises UsageError: not one that a secondary can have of its own."""
    if key not in PEER_SETTINGS:
        known = ", ".join(PEER_SETTINGS)
        raise UsageError(
            f'"{key}" is the same for all secondaries', hint=f"with --peer goes only: {known}"
        )
    return f"{key}.{peer}"


def _one_node(argument: str | None, option: str | None) -> str:
    """:raises UsageError: no node, or two."""
    if (argument is None) == (option is None):
        raise UsageError("which node? write NODE, or --node NODE, once")
    node = argument or option
    assert node is not None
    return node


def _named(text: str, node: str) -> str:
    """`[VOLUME=]PATH` as `parse_backings` takes it."""
    if text.startswith("/"):
        return f"{node}={text}"
    volume, _, path = text.partition("=")
    return f"{node}/{volume}={path}"


def _set(result: dict[str, Any]) -> str:
    lines = [f'settings of "{result["name"]}" (version {result["version"]}):']
    lines += [f"  {key} = {value}" for key, value in sorted(result["settings"].items())]
    if result["waits_for"]:
        nodes = ", ".join(result["waits_for"])
        lines.append(
            f"pending: {nodes}; what flushes wait for changes when it knows (--force: now)"
        )
        return "\n".join(lines)
    return "\n".join(lines if result["settings"] else [f'"{result["name"]}" has its defaults'])


def _said(result: dict[str, Any], text: str) -> str:
    if not result["pending"]:
        return text
    nodes = ", ".join(result["pending"])
    return f"{text}\npending: {nodes}; told as soon as the link is up (geomirror link list)"
