"""`geomirror lab`: several nodes on this machine with emulated WAN links."""

from __future__ import annotations

import asyncio
import signal
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.units import parse_duration
from geomirror.errors import UsageError

UP_TIMEOUT_S = 60.0
DOWN_TIMEOUT_S = 30.0

directory_option = click.option(
    "--dir",
    "directory",
    default="geomirror-lab",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the lab's data directories, logs and state are.",
)


@click.group()
def lab() -> None:
    """Several nodes on this machine with emulated WAN links; no root needed.

    \b
    geomirror lab up --sites 3 --link a-b:rtt=80ms,rate=100mbit,loss=0.5% --background
    geomirror --data-dir geomirror-lab/a status
    geomirror lab flap a-b --down 2s --period 5s --count 10
    geomirror lab down

    Link settings: rtt= or delay= (one way), jitter=, rate= (mbit, gbit), loss=, cut= (rate lost by
    a loss), queue=, window= (bytes of one connection on their way), down=blackhole|reset.
    """


def _nodes(sites: int, names: tuple[str, ...]) -> list[tuple[str, str]]:
    if not names:
        return [(letter, letter) for letter in string.ascii_lowercase[:sites]]
    nodes = []
    for text in names:
        site, separator, name = text.partition("/")
        nodes.append((site, name if separator else site))
    return nodes


@lab.command()
@directory_option
@click.option("--sites", default=3, show_default=True, type=click.IntRange(1, 16), metavar="N",
              help="Nodes a, b, c, ..., each at a site of its own.")  # fmt: skip
@click.option("--node", "names", multiple=True, metavar="SITE/NAME",
              help="A node with these names; instead of --sites, repeated.")  # fmt: skip
@click.option("--link", "links", multiple=True, metavar="A-B:SETTINGS",
              help="Settings of one link, repeated.")  # fmt: skip
@click.option("--default-link", default="", metavar="SETTINGS",
              help="Settings of the links that --link does not name.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Of all jitter, loss and flaps.")
@click.option("--background", is_flag=True, help="Return when it is up; stop it with lab down.")
@json_option
@pass_app
def up(
    app: App,
    directory: Path,
    sites: int,
    names: tuple[str, ...],
    links: tuple[str, ...],
    default_link: str,
    seed: int,
    background: bool,
) -> None:
    """Start a lab, in the foreground until Ctrl-C or in the background.

    A directory that holds a lab already is started again with its data.
    """
    from geomirror.lab.lab_state_io import LOG_FILE, refuse_second, wait_until_up
    from geomirror.lab.scenario import LinkSettings, parse_link, parse_settings

    directory = directory.absolute()
    refuse_second(directory)
    nodes = _nodes(sites, names)
    node_names = [name for _, name in nodes]
    # Checked here too, so that a typing error is reported at once and not in a log.
    default = parse_settings(default_link, LinkSettings())
    parsed = [parse_link(text, node_names, default) for text in links]
    settings = {(first, second): values for first, second, values in parsed}
    if background:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [sys.executable, "-m", "geomirror", "lab", "up", "--dir", str(directory)]
        command += ["--seed", str(seed), "--default-link", default_link]
        for site, name in nodes:
            command += ["--node", f"{site}/{name}"]
        for text in links:
            command += ["--link", text]
        with open(directory / LOG_FILE, "wb") as log:
            # It has to outlive this command, so no death signal, and a session of its own.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        state = wait_until_up(directory, process.pid, UP_TIMEOUT_S)
        app.show(state, lambda: _describe(state))
    else:
        asyncio.run(_serve(app, directory, nodes, settings, default, seed))


async def _serve(
    app: App,
    directory: Path,
    nodes: list[tuple[str, str]],
    settings: dict[tuple[str, str], Any],
    default: Any,
    seed: int,
) -> None:
    from geomirror.lab.lab_io import Lab
    from geomirror.lab.lab_state_io import read_state, remove_state, write_state

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    app.progress(f"starting {len(nodes)} nodes in {directory}")
    made = Lab(directory, nodes=nodes, links=settings, default=default, seed=seed)
    async with made:
        write_state(made)
        state = read_state(directory)
        app.show(state, lambda: _describe(state))
        await stop.wait()
        app.progress("stopping")
        remove_state(directory)


def _describe(state: dict[str, Any]) -> str:
    rows = [[n["name"], n["site"], str(n["pid"] or "-"), n["data_dir"]] for n in state["nodes"]]
    first = state["nodes"][0]["data_dir"]
    return (
        table(["NODE", "SITE", "PID", "DATA DIR"], rows)
        + f"\n\nTalk to a node: geomirror --data-dir {first} status"
    )


@lab.command()
@directory_option
@json_option
@pass_app
def down(app: App, directory: Path) -> None:
    """Stop the lab of a directory; its data stays."""
    from geomirror.lab.lab_state_io import stop_lab

    stop_lab(directory.absolute(), DOWN_TIMEOUT_S)
    app.show({"stopped": True}, "")


@lab.command()
@directory_option
@json_option
@pass_app
def status(app: App, directory: Path) -> None:
    """Show the nodes and links of a running lab."""
    from geomirror.lab.lab_state_io import read_state
    from geomirror.node.process_identity import start_time

    state = read_state(directory.absolute())
    links = _call(directory, "status")
    nodes = [
        {**node, "is_running": bool(node["pid"] and start_time(node["pid"]))}
        for node in state["nodes"]
    ]
    document = {"directory": str(directory.absolute()), "nodes": nodes, "links": links}
    app.show(document, lambda: _status_text(nodes, links))


def _status_text(nodes: list[dict[str, Any]], links: list[dict[str, Any]]) -> str:
    running = [
        [node["name"], node["site"], "running" if node["is_running"] else "ended", node["data_dir"]]
        for node in nodes
    ]
    rows = []
    for link in links:
        for direction in link["directions"]:
            settings = direction["settings"]
            rate = settings["rate_bits_per_second"]
            rows.append([
                direction["name"],
                "up" if direction["is_up"] else "down",
                f"{settings['delay_ns'] / 1e6:g} ms",
                f"{rate / 1e6:g} Mbit/s" if rate else "unlimited",
                f"{settings['loss'] * 100:g} %",
                str(direction["connections"]),
                f"{direction['bytes_delivered'] / 1e6:.1f} MB",
                str(direction["lost_packets"]),
            ])  # fmt: skip
    headings = ["LINK", "STATE", "DELAY", "RATE", "LOSS", "CONNECTIONS", "DELIVERED", "LOST"]
    nodes_text = table(["NODE", "SITE", "DAEMON", "DATA DIR"], running)
    return f"{nodes_text}\n\n{table(headings, rows)}"


@lab.command("set")
@click.argument("link")
@click.argument("settings", nargs=-1, required=True)
@click.option("--from", "source", metavar="NODE", help="Only the direction out of this node.")
@directory_option
@json_option
@pass_app
def set_link(
    app: App, link: str, settings: tuple[str, ...], source: str | None, directory: Path
) -> None:
    """Change settings of a link while it runs: lab set a-b rate=10mbit loss=2%."""
    _call(directory, "set", link, settings=",".join(settings), source=source)
    app.show({"link": link}, "")


@lab.command("link")
@click.argument("link")
@click.argument("state", type=click.Choice(["up", "down", "reset"]))
@click.option("--from", "source", metavar="NODE", help="Down: only the direction out of NODE.")
@directory_option
@json_option
@pass_app
def link_state(app: App, link: str, state: str, source: str | None, directory: Path) -> None:
    """Take a link down, bring it up, or reset its connections."""
    if source is not None and state != "down":
        raise UsageError("--from goes with down only")
    parameters = {"source": source} if state == "down" else {}
    _call(directory, state, link, **parameters)
    app.show({"link": link, "state": state}, "")


@lab.command()
@click.argument("link")
@click.option(
    "--down",
    "down_s",
    type=parse_duration,
    default="2s",
    show_default=True,
    metavar="TIME",
    help="Length of an outage.",
)
@click.option(
    "--period",
    "period_s",
    type=parse_duration,
    default="5s",
    show_default=True,
    metavar="TIME",
    help="From one outage to the next.",
)
@click.option(
    "--count",
    metavar="N",
    default=10,
    show_default=True,
    help="Outages; 0 ends a running schedule.",
)
@directory_option
@json_option
@pass_app
def flap(app: App, link: str, down_s: float, period_s: float, count: int, directory: Path) -> None:
    """Take a link down again and again; both times vary by 20 %, seeded. Returns at once."""
    _call(directory, "flap", link, down_s=down_s, period_s=period_s, count=count)
    app.show({"link": link, "count": count}, "")


@lab.command()
@click.argument("node")
@click.option("--heal", is_flag=True, help="Bring its links up again.")
@directory_option
@json_option
@pass_app
def partition(app: App, node: str, heal: bool, directory: Path) -> None:
    """Cut a node off from all others."""
    _call(directory, "partition", node=node, is_up=heal)
    app.show({"node": node, "is_up": heal}, "")


def _call(directory: Path, method: str, link: str | None = None, **parameters: Any) -> Any:
    from geomirror.lab.emulator_control_io import EmulatorClient
    from geomirror.lab.lab_state_io import read_state
    from geomirror.lab.scenario import parse_link_name

    state = read_state(directory.absolute())
    if link is not None:
        names = [node["name"] for node in state["nodes"]]
        parameters["link"] = list(parse_link_name(link, names))
    client = EmulatorClient(Path(state["emulator_socket"]))
    return asyncio.run(client.call(method, **parameters))


@lab.command()
@click.option("--node", "names", multiple=True, metavar="NAME",
              help="A node, repeated. Default: a and b.")  # fmt: skip
@click.option("--link", "links", multiple=True, metavar="A-B:SETTINGS",
              help="Settings of one link, repeated.")  # fmt: skip
@click.option("--seed", default=1, show_default=True, help="Of all that is left to chance.")
@json_option
@pass_app
def packets(app: App, names: tuple[str, ...], links: tuple[str, ...], seed: int) -> None:
    """Network namespaces behind packet-level links, until Ctrl-C; needs root and a C compiler.

    Link settings: rtt= or delay=, jitter=, rate=, queue=, loss=, burst=2%/20, reorder=1%/5ms,
    duplicate=, corrupt=, mtu=.
    """
    from geomirror.lab.packet_scenario import PacketSettings, parse_packet_settings
    from geomirror.lab.scenario import parse_link_name

    nodes = names or ("a", "b")
    settings: dict[tuple[str, str], Any] = {}
    for text in links:
        name, _, values = text.partition(":")
        pair = parse_link_name(name.strip(), nodes)
        settings[pair] = parse_packet_settings(values, PacketSettings())
    asyncio.run(_serve_packets(app, nodes, settings, seed))


async def _serve_packets(
    app: App, nodes: tuple[str, ...], settings: dict[tuple[str, str], Any], seed: int
) -> None:
    from geomirror.lab.packet_emulator_io import PacketEmulator

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with PacketEmulator(nodes, settings, seed=seed) as emulator:
        found = [emulator.node(name).to_json() | {"name": name} for name in nodes]

        def describe() -> str:
            rows = [[n["name"], n["ipv4"], n["ipv6"], n["namespace"]] for n in found]
            run = f"ip netns exec {found[0]['namespace']} COMMAND"
            return table(["NODE", "IPV4", "IPV6", "NAMESPACE"], rows) + f"\n\nRun inside: {run}"

        app.show({"schema_version": 1, "nodes": found}, describe)
        await stop.wait()
