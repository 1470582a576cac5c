"""The root of the command line: global options, and every command by name, loaded when needed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

import rich_click as click
from click.exceptions import Exit

from geomirror import __version__
from geomirror.cli.common import App, report_error
from geomirror.errors import GeomirrorError, LocalProtocolError, UsageError
from geomirror.node.paths import DataDir

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count."""

PANELS: dict[str, dict[str, str]] = {
    "Network": {
        "network": "geomirror.cli.network",
        "token": "geomirror.cli.token",
        "join": "geomirror.cli.join",
        "node": "geomirror.cli.node_changes",
        "link": "geomirror.cli.link",
        "tunnel": "geomirror.cli.tunnel",
        "doctor": "geomirror.cli.doctor",
    },
    "Services": {
        "expose": "geomirror.cli.expose",
        "unexpose": "geomirror.cli.expose",
        "forward": "geomirror.cli.forward",
        "unforward": "geomirror.cli.forward",
        "service": "geomirror.cli.service",
    },
    "Replication": {
        "resource": "geomirror.cli.resource_changes",
        "pause": "geomirror.cli.replication",
        "resume": "geomirror.cli.replication",
        "wait": "geomirror.cli.replication",
        "verify": "geomirror.cli.verify",
    },
    "Disaster": {
        "switchover": "geomirror.cli.switchover",
        "failover": "geomirror.cli.failover",
        "demote": "geomirror.cli.demote",
        "resolve": "geomirror.cli.resolve",
    },
    "Volumes": {
        "attach": "geomirror.cli.attach",
        "detach": "geomirror.cli.attach",
        "volume": "geomirror.cli.volume",
        "nbd": "geomirror.cli.nbd",
        "mark": "geomirror.cli.mark",
        "timeline": "geomirror.cli.timeline",
        "view": "geomirror.cli.view",
        "drill": "geomirror.cli.drill",
        "resync": "geomirror.cli.resync",
        "rewind": "geomirror.cli.rewind",
        "branch": "geomirror.cli.branch",
    },
    "Observation": {
        "status": "geomirror.cli.status",
        "watch": "geomirror.cli.watch",
        "events": "geomirror.cli.events",
        "check": "geomirror.cli.check",
    },
    "Trying out": {
        "lab": "geomirror.cli.lab",
        "demo": "geomirror.cli.demo",
    },
}
"""Panel of the help text -> command -> module; the command object has the command's name."""


class LazyGroup(click.RichGroup):
    """Imports a command's module only when that command (or the whole help) is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of all commands that this installation has."""
        return [name for name in _modules() if _exists(name)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command object, or None."""
        if name not in _modules() or not _exists(name):
            return None
        command = getattr(importlib.import_module(_modules()[name]), name)
        assert isinstance(command, click.Command)
        return command


def _modules() -> dict[str, str]:
    return {name: module for panel in PANELS.values() for name, module in panel.items()}


def _exists(name: str) -> bool:
    return importlib.util.find_spec(_modules()[name]) is not None


def _help_configuration() -> click.RichHelpConfiguration:
    return click.RichHelpConfiguration(
        style_commands_panel_box="SIMPLE",
        style_options_panel_box="SIMPLE",
        style_option="bold",
        style_command="bold",
        commands_table_column_types=["name", "help"],
        max_width=100,
        text_markup="rich",
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.rich_config(help_config=_help_configuration())
@click.option(
    "--data-dir",
    envvar="GEOMIRROR_DATA_DIR",
    metavar="DIR",
    show_envvar=True,
    help="The node on this machine to talk to. "
    "Default: /var/lib/geomirror for root, else ~/.local/share/geomirror.",
)
@click.option("--debug", is_flag=True, help="Show a traceback when something unexpected happens.")
@click.version_option(__version__, prog_name="geomirror")
@click.pass_context
def root(context: click.Context, data_dir: str | None, debug: bool) -> None:
    """Always-consistent replication of block devices between clouds.

    A write is answered when the local journal has it; other sites follow seconds behind, and what
    they hold is a usable image of the volume at every instant.

    \b
    [bold]Two nodes, four commands:[/bold]
      geomirror network create acme --site east --listen 192.0.2.1:7701
      geomirror node run               [dim]# on both nodes; systemd does it[/dim]
      geomirror token create --site west       [dim]# then there: geomirror join TOKEN[/dim]
      geomirror resource create pg --size 10G --primary east-1 --secondary west-1

    Then `geomirror attach pg /srv/pg`, or give the `nbd_uri` of `geomirror status` to QEMU.
    """
    context.obj = App(DataDir.at(data_dir), is_debug=debug)


for _panel, _commands in PANELS.items():
    root.add_panel(click.RichCommandPanel(_panel, commands=[n for n in _commands if _exists(n)]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing is raised."""
    is_json, is_debug = "--json" in arguments, "--debug" in arguments
    try:
        result = root.main(args=list(arguments), prog_name="geomirror", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except GeomirrorError as error:
        return report_error(error, is_json=is_json)
    except Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        if is_json:
            return report_error(UsageError(error.format_message()), is_json=True)
        error.show()
        return UsageError.exit_code
    except BrokenPipeError:
        # The reader of our output (head, less) is gone: nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last frame: a bug becomes an exit code
        if is_debug:
            traceback.print_exc()
        text = f"unexpected {type(error).__name__}: {error}"
        hint = "this is a bug; run it again with --debug and report what it prints"
        return report_error(LocalProtocolError(text, hint=hint), is_json=is_json)
