"""`geomirror token …`"""

from __future__ import annotations

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app
from geomirror.cli.units import parse_duration
from geomirror.errors import RefusedError


@click.group()
def token() -> None:
    """Tokens with which nodes join the network."""


@token.command()
@click.option("--site", required=True, metavar="SITE", help="Site of the node that will join.")
@click.option("--node", metavar="NODE", help="Its name. Default: the joiner proposes its host's.")
@click.option(
    "--role",
    type=click.Choice(["member", "witness"]),
    default="member",
    show_default=True,
    help="What the node is for; witness is refused until failover needs one.",
)
@click.option(
    "--expires",
    type=parse_duration,
    default="1h",
    show_default=True,
    metavar="TIME",
    help="How long it can be used; it works once in any case.",
)
@json_option
@pass_app
def create(app: App, site: str, node: str | None, role: str, expires: float) -> None:
    """Print a join token, and nothing else, on stdout.

    Runs on a node that holds the network authority's key: the one that created the network.
    The token is a secret until it is used or expires.
    """
    if role == "witness":
        raise RefusedError(
            "there is nothing for a witness to do: failover is by command, and no lease is granted "
            "by a quorum",
            hint="leave --role out; a member without resources holds no data either",
        )
    from geomirror.environment import SystemClock
    from geomirror.tunnel.network_io import create_token, load_network

    text = create_token(
        load_network(app.data_dir.root),
        site=site,
        node=node,
        role=role,
        expires_seconds=int(expires),
        wall_ns=SystemClock().wall_ns(),
    )
    parameters = {"site": site, "node": node, "role": role, "expires_seconds": int(expires)}
    app.note("token.create", parameters)
    app.show({"token": text, "site": site, "node": node, "expires_seconds": int(expires)}, text)
