"""`geomirror watch`"""

from __future__ import annotations

import time

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, print_json


@click.command()
@click.argument("name", metavar="[RES]", required=False)
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)
@click.option("--count", metavar="N", type=click.IntRange(1), help="Stop after N looks.")
@json_option
@pass_app
def watch(app: App, name: str | None, interval: float, count: int | None) -> None:
    """Show `status` live until interrupted; with --json one document after the other."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from geomirror.cli.render import render_status

    console = Console(stderr=False)
    looks = 0

    def look() -> Text:
        document = app.call("status", {"name": name}, timeout_s=15)
        if app.is_json:
            print_json(document)
        return Text(f"{time.strftime('%H:%M:%S')}  {render_status(document)}")

    def is_last() -> bool:
        nonlocal looks
        looks += 1
        return count is not None and looks >= count

    first = look()
    if app.is_json:
        while not is_last():
            time.sleep(interval)
            look()
        return
    with Live(first, console=console, auto_refresh=False, screen=console.is_terminal) as live:
        live.refresh()
        while not is_last():
            time.sleep(interval)
            live.update(look(), refresh=True)
