"""What every command shares: the node it talks to, `--json`, and how results and errors look.

Commands import heavy modules (aiohttp, cryptography, numpy) inside their functions: `status` has to
start in a third of a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import rich_click as click

from geomirror.errors import GeomirrorError, UsageError
from geomirror.node.control_client_io import ControlClient
from geomirror.node.error_json import error_object
from geomirror.node.paths import DataDir

SCHEMA_VERSION = 1
"""Version of every `--json` document; it grows only when a key changes its meaning or goes away."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class App:
    """One run of the command line."""

    data_dir: DataDir
    is_json: bool = False
    is_debug: bool = False

    def client(self) -> ControlClient:
        """Client of the daemon of this data directory."""
        return ControlClient(self.data_dir)

    def call(
        self, method: str, parameters: Mapping[str, Any] | None = None, *, timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """Call the daemon; see `ControlClient.call`."""
        return self.client().call(method, parameters, timeout_s=timeout_s)

    def show(self, result: Mapping[str, Any], text: str | Callable[[], str]) -> None:
        """Print a result: as JSON with `--json`, else `text` (nothing when it is empty)."""
        if self.is_json:
            print_json(result)
            return
        rendered = text if isinstance(text, str) else text()
        if rendered:
            click.echo(rendered)

    def progress(self, text: str) -> None:
        """Say on stderr what is going on."""
        if not self.is_json:
            click.echo(text, err=True)

    def note(self, act: str, parameters: Mapping[str, Any]) -> None:
        """Append an act without a daemon to the audit log; it counts where that cannot be."""
        from geomirror.node.audit import append_act

        try:
            append_act(self.data_dir.root, act, parameters)
        except GeomirrorError as error:
            self.progress(f"warning: not in the audit log: {error}")

    def confirm(self, question: str, *, is_confirmed: bool) -> None:
        """Ask before something that cannot be undone.

        :raises UsageError: no `--yes` and nobody to ask, or the answer is no.
        """
        if is_confirmed:
            return
        if self.is_json or not sys.stdin.isatty():
            raise UsageError(f"{question} needs confirmation", hint="add --yes")
        if not click.confirm(question + "?", err=True):
            raise UsageError("not confirmed; nothing was changed")


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, `schema_version` first."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=2))


def report_error(error: GeomirrorError, *, is_json: bool) -> int:
    """Show an error (JSON on stdout, or text on stderr) and return its exit code."""
    if is_json:
        print_json({"error": error_object(error)})
    else:
        click.echo(f"geomirror: {error.message} (exit {error.exit_code})", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
    return error.exit_code


pass_app = click.make_pass_decorator(App)


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
"""Of a command that asks before it does something that cannot be taken back."""


def json_option(function: F) -> F:
    """Add `--json`."""

    def take(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        app = context.find_object(App)
        if value and app is not None:
            app.is_json = True

    option = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=take,
        help=f"Print one JSON document (schema version {SCHEMA_VERSION}).",
    )
    return option(function)


def refuse_others(option: str, given: Mapping[str, object], why: str, hint: str) -> None:
    """Refuse options that mean nothing beside another one.

    :param given: value by name without dashes; None or an empty one was not given.
    :raises UsageError: some were given; says why they mean nothing.
    """
    names = [f"--{name}" for name, value in given.items() if value not in (None, (), False)]
    if names:
        raise UsageError(f"{option} takes no {' and no '.join(names)}: {why}", hint=hint)


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Plain aligned columns, for terminals and for `awk` alike."""
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
