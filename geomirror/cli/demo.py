"""`geomirror demo`: the main job on one machine, with faults, judged byte by byte."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from click.exceptions import Exit

from geomirror.cli.common import App, json_option, pass_app, print_json


@click.command()
@click.option(
    "--report",
    "report_path",
    default="geomirror-demo/report.json",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the result goes; disks and logs are beside it while it runs.",
)
@click.option("--link", default="", metavar="SETTINGS", help="Of all links, as in lab --link.")
@click.option(
    "--rtt", metavar="TIME", default="80ms", show_default=True, help="Round trip of all links."
)
@click.option(
    "--rate", metavar="RATE", default="100mbit", show_default=True, help="Rate of all links."
)
@click.option("--loss", metavar="PERCENT", default="0.5%", show_default=True, help="Lost packets.")
@click.option("--seconds", default=30.0, show_default=True, type=click.FloatRange(20, 3600),
              help="Time under load.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Of writes, jitter, loss and flaps.")
@click.option("--keep", is_flag=True, help="Keep disks and logs also when all checks hold.")
@json_option
@pass_app
def demo(
    app: App,
    report_path: Path,
    link: str,
    rtt: str,
    rate: str,
    loss: str,
    seconds: float,
    seed: int,
    keep: bool,
) -> None:
    """Mirror a disk through flaps and kills, undo a mistake, fail over and back; check every byte.

    Three daemons on this machine, emulated WAN links, about two minutes, no root. Exits 0 only if
    all checks hold.
    """
    from rich.console import Console

    from geomirror.lab.demo import DemoOptions, run_demo
    from geomirror.lab.scenario import WAN, parse_settings

    settings = parse_settings(f"rtt={rtt},rate={rate},loss={loss},{link}", WAN)
    options = DemoOptions(report_path, settings, seconds=seconds, seed=seed, keeps_files=keep)
    report = run_demo(options, Console(stderr=True))
    if app.is_json:
        print_json(report.to_json())
    if not report.passed:
        raise Exit(1)
