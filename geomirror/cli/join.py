"""`geomirror join`"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app
from geomirror.errors import UnreachableError, UsageError

RETRY_S = 30.0
"""The other daemon may have been started a moment ago; on a busy machine that took 11 s."""
TOKEN_BYTES_MAX = 8192


@click.command()
@click.argument("token", metavar="TOKEN|-", required=False)
@click.option("--token-file", type=click.Path(dir_okay=False), metavar="F", help="Read it here.")
@click.option("--listen", metavar="HOST:PORT", help="Where other nodes reach this one.")
@click.option("--node", metavar="NODE", help="Name, when the token has none.")
@json_option
@pass_app
def join(
    app: App, token: str | None, token_file: str | None, listen: str | None, node: str | None
) -> None:
    """Join a network with a token from `geomirror token create`.

    `-` reads the token from stdin, so that it appears in no process list. Without --listen this
    node only dials out, which is right behind NAT.

    Where only an HTTP proxy or HTTPS leads out, write DATA_DIR/geomirror.toml before: links.proxy,
    or the authority's wss:// URL as an endpoint in [peers.NAME].
    """
    import asyncio

    from geomirror.environment import SystemClock, SystemEntropy
    from geomirror.node.config_io import load_config
    from geomirror.node.network_view import own_object
    from geomirror.node.way_out import load_way_out
    from geomirror.tunnel.link_path import is_url
    from geomirror.tunnel.network_io import join as join_network

    text = read_token(token, token_file)
    app.data_dir.create()
    config = load_config(app.data_dir.config)
    way_out = load_way_out(config.links, app.data_dir.root)
    endpoints = [e for entry in config.peers.values() for e in entry.endpoints if is_url(e)]
    give_up, told = time.monotonic() + RETRY_S, ""
    while True:
        try:
            work = join_network(
                app.data_dir.root,
                text,
                listen=listen,
                node=node,
                proxy=config.links.proxy,
                way_out=way_out,
                more_endpoints=endpoints,
                clock=SystemClock(),
                entropy=SystemEntropy(),
            )
            state = asyncio.run(work)
            break
        except UnreachableError as error:
            if time.monotonic() > give_up:
                raise
            told = _tell(app, f"{error.message}; trying again for {RETRY_S:g} s", told)
            time.sleep(0.5)
    app.note("network.join", {"network": state.network, "node": state.node})
    said = f'joined network "{state.network}" as node "{state.node}" at "{state.site}"\n'
    said += f'next: "geomirror --data-dir {app.data_dir.root} node run"'
    app.show(own_object(state), said)


def read_token(token: str | None, token_file: str | None) -> str:
    """The token from the argument, stdin (`-`) or a file.

    :raises UsageError: none or two of them, or a file that cannot be read.
    """
    if (token is None) == (token_file is None):
        raise UsageError("give either a TOKEN (or - for stdin) or --token-file")
    if token_file is not None:
        try:
            with Path(token_file).open(encoding="ascii", errors="replace") as file:
                return file.read(TOKEN_BYTES_MAX).strip()
        except OSError as error:
            raise UsageError(f"{token_file}: {error.strerror}") from error
    assert token is not None
    return sys.stdin.read(TOKEN_BYTES_MAX).strip() if token == "-" else token


def _tell(app: App, text: str, told: str) -> str:
    """Say why it waits, unless that was the last thing said; returns what is said by now."""
    if text != told:
        app.progress(text)
    return text
