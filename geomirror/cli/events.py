"""`geomirror events`"""

from __future__ import annotations

import json
import sys
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with new events until interrupted.")
@click.option(
    "--count",
    "-n",
    metavar="N",
    type=click.IntRange(0, 2000),
    default=100,
    show_default=True,
    help="The newest N events.",
)
@json_option
@pass_app
def events(app: App, follow: bool, count: int) -> None:
    """Print what happened on this node, one JSON object a line (NDJSON)."""
    for event in app.client().events(follow=follow, count=count):
        click.echo(json.dumps(event) if app.is_json or not _is_terminal() else _line(event))


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _line(event: dict[str, Any]) -> str:
    fields = {k: v for k, v in event.items() if k not in ("number", "time", "kind")}
    rest = "  ".join(f"{key}={value}" for key, value in fields.items() if value is not None)
    return f"{event['time']}  {event['kind']:<22} {rest}"
