"""`geomirror nbd`"""

from __future__ import annotations

import sys
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, report_error
from geomirror.errors import NotFoundError, RefusedError, UsageError
from geomirror.node.error_json import error_from_object


@click.command()
@click.argument("volume", metavar="RES[/VOLUME]")
@click.option("--stdio", is_flag=True, help="Serve one client on stdin and stdout, then exit.")
@json_option
@pass_app
def nbd(app: App, volume: str, stdio: bool) -> None:
    """Serve one volume to an NBD client that starts its own server.

    Everything is relayed to the daemon of this node. The client sees this volume only, under the
    empty name too, so that it needs no export name, and no access to the others.

    Without --stdio it serves the socket that the client hands over (LISTEN_FDS, as systemd and
    libnbd's [ COMMAND ] do), any number of connections, until SIGTERM. With --stdio it can be the
    forced command of a key in authorized_keys, which then gives access to this volume alone.

    \b
    [bold]Examples:[/bold]
      nbdinfo [ geomirror nbd pg ]
      nbdcopy -- [ geomirror --data-dir D nbd pg ] disk.img
      nbdfuse m --command geomirror nbd pg --stdio
    """
    from geomirror.nbd.client_handshake import parse_uri
    from geomirror.node.activation_io import close_all, take_activated_sockets
    from geomirror.node.relay_server_io import RelayServer, relay_standard_streams

    activated = take_activated_sockets()
    try:
        if not stdio and len(activated) != 1:
            raise UsageError(
                f"{len(activated)} sockets were handed over, and exactly one is served"
                if activated
                else "no client: neither --stdio nor a socket that was handed over",
                hint='run it as "nbdinfo [ geomirror nbd RES ]", or see "geomirror nbd --help"',
            )
        if stdio and sys.stdin.isatty():
            raise UsageError("--stdio speaks NBD, and stdin is a terminal")
        address = parse_uri(find_volume_uri(app, volume))
        assert address.path is not None
        if stdio:
            relay_standard_streams(address.path, address.export)
            return

        def report(error: Any) -> None:
            report_error(error, is_json=app.is_json)

        RelayServer(activated[0].listener, address.path, address.export, report).run()
    finally:
        close_all(activated)


def find_volume_uri(app: App, volume: str) -> str:
    """The `nbd_uri` of `RES[/VOLUME]` on this node; the first volume when none is named.

    :raises NotFoundError: no such resource or volume here.
    :raises GeomirrorError: it is not served; the reason is the resource's.
    """
    resource, separator, name = volume.partition("/")
    found = app.call("status", {"name": resource})["resources"][0]
    volumes = found["volumes"]
    for entry in volumes:
        if not separator or entry["name"] == name:
            if entry["nbd_uri"] is None:
                if found.get("error"):
                    raise error_from_object(found["error"])
                raise RefusedError(
                    f'"{volume}" is not served: {found["state"]}',
                    hint=f'see "geomirror status {resource}"',
                )
            return str(entry["nbd_uri"])
    names = ", ".join(entry["name"] for entry in volumes)
    raise NotFoundError(f'resource "{resource}" has no volume "{name}"', hint=f"it has: {names}")
