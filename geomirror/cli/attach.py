"""`geomirror attach` and `geomirror detach`"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.units import format_seconds, parse_duration
from geomirror.errors import UsageError

if TYPE_CHECKING:
    from geomirror.node.attach_supervisor import Wanted

TIMEOUT = "10m"
"""Longer than a restart with a full journal's recovery; a kernel that waits holds its users."""


@click.command()
@click.argument("volume", metavar="[RES[/VOLUME]]", required=False)
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@click.option("--device", is_flag=True, help="Make the block device only, and print its path.")
@click.option("--read-only", is_flag=True, help="Writes are refused, whoever tries.")
@click.option("--fs-options", metavar="OPTIONS", default="", help="For mount -o, as noatime.")
@click.option(
    "--timeout",
    metavar="DURATION|never",
    default=TIMEOUT,
    show_default=True,
    help="How long reads and writes wait for a daemon that is away, before they get EIO.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "nbd", "fuse"]),
    default="auto",
    show_default=True,
    help="nbd: the kernel's module and nbd-client; fuse: nbdfuse and a loop device.",
)
@click.option("--foreground", is_flag=True, help="Serve it here, until detached; systemd does.")
@click.option("--list", "is_list", is_flag=True, help="Show what is attached.")
@json_option
@pass_app
def attach(
    app: App,
    volume: str | None,
    mountpoint: str | None,
    device: bool,
    read_only: bool,
    fs_options: str,
    timeout: str,
    method: str,
    foreground: bool,
    is_list: bool,
) -> None:
    """Attach a volume as a block device, or mount the file system that is on it.

    Needs root. Nothing is ever formatted. It outlives restarts and crashes of the daemon: reads and
    writes wait meanwhile and then go on, without an error and without a loss. A secondary's copy is
    attached read-only, at the epoch that it has now.

    \b
    [bold]Examples:[/bold]
      geomirror attach pg --device     [dim]# prints /dev/loop0; mkfs.ext4 it once[/dim]
      geomirror attach pg /srv/pg --fs-options noatime
      geomirror attach --list
    """
    if is_list:
        _list(app)
        return
    if volume is None or (mountpoint is None) == (not device):
        raise UsageError(
            "name a volume, and either a mountpoint or --device",
            hint='as "geomirror attach pg /srv/pg"; --list shows what is attached',
        )
    from geomirror.node.attach_supervisor import Wanted

    timeout_s = None if timeout == "never" else parse_duration(timeout)
    wanted = Wanted(mountpoint, read_only, fs_options, timeout_s)
    _attach(app, volume, wanted, None if method == "auto" else method, in_foreground=foreground)


def _attach(
    app: App, volume: str, wanted: Wanted, method: str | None, *, in_foreground: bool
) -> None:
    from geomirror.node.attach_client import start_attachment
    from geomirror.node.attach_plan import choose_method
    from geomirror.node.attach_run import check_mountpoint, run_attachment
    from geomirror.node.attach_tools import gather_facts

    mountpoint = wanted.mountpoint
    method = choose_method(method, gather_facts(), mounts=mountpoint is not None)
    if mountpoint is not None:
        wanted = replace(wanted, mountpoint=check_mountpoint(mountpoint))
    if in_foreground:
        run_attachment(app.data_dir, volume, method, wanted, lambda found: _ready(app, found))
    else:
        _ready(app, start_attachment(app.data_dir, volume, method, wanted))


def _ready(app: App, found: dict[str, Any]) -> None:
    app.show(found, lambda: _attached(found))
    if found["epoch"] is not None:
        app.progress(
            f"read-only: this is a copy, seen as of epoch {found['epoch']}; while it is read, "
            f'applying waits, for a minute at most: see "geomirror pause --help"'
        )


def _attached(found: dict[str, Any]) -> str:
    if found["mountpoint"] is None:
        return str(found["device"])
    what = "read-only " if found["is_read_only"] else ""
    return f"{found['name']} is mounted {what}at {found['mountpoint']} ({found['device']})"


def _list(app: App) -> None:
    from geomirror.node.attach_client import list_attachments

    found = list_attachments(app.data_dir)
    app.show({"attachments": found}, lambda: _table(found))


def _table(found: list[dict[str, Any]]) -> str:
    rows = []
    for entry in found:
        state = entry["state"]
        if state == "waiting":
            state += f" {format_seconds(entry['waiting_seconds'])}"
        mode = "ro" if entry["is_read_only"] else "rw"
        where = entry["mountpoint"] or "-"
        rows.append([entry["name"], entry["device"] or "-", where, mode, state])
    lines = [table(["VOLUME", "DEVICE", "MOUNTPOINT", "MODE", "STATE"], rows)]
    lines += [f"  {entry['name']}: {entry['reason']}" for entry in found if entry["reason"]]
    return "\n".join(lines) if found else "nothing is attached"


@click.command()
@click.argument("volume", metavar="RES[/VOLUME]|MOUNTPOINT|DEVICE")
@click.option(
    "--lazy",
    is_flag=True,
    help="Take the mount out of sight now; the rest ends with the last process that uses it.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Give up a daemon that is away: what is not written yet is lost.",
)
@json_option
@pass_app
def detach(app: App, volume: str, lazy: bool, force: bool) -> None:
    """Unmount and detach a volume, with everything written and flushed.

    Refused while somebody uses it; the message names the processes. What a killed attachment
    left behind is cleaned up.
    """
    from geomirror.node.attach_client import detach as end
    from geomirror.node.attach_client import find_attachment

    files = find_attachment(app.data_dir, volume)
    result = end(files, is_lazy=lazy, is_forced=force)
    app.show(result, lambda: _detached(result))


def _detached(result: dict[str, Any]) -> str:
    text = f"{result['name']} is detached"
    if not result["is_gone"]:
        text = f"{result['name']} is unmounted; it is detached when its last user ends"
    if not result["is_clean"]:
        text += "\nits end was not orderly: what was written and not flushed may be missing"
    return "\n".join([text, *(f"  {line}" for line in result["cleaned"])])
