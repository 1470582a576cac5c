"""`geomirror mark`: a name for the state of this instant."""

from __future__ import annotations

from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, table
from geomirror.cli.timeline import local
from geomirror.errors import UsageError


@click.command()
@click.argument("name", metavar="RES")
@click.argument("mark_name", metavar="[NAME]", required=False)
@click.option("--list", "is_list", is_flag=True, help="Show the marks that the copy here knows.")
@click.option("--delete", "is_delete", is_flag=True, help="Take the mark back, everywhere.")
@json_option
@pass_app
def mark(app: App, name: str, mark_name: str | None, is_list: bool, is_delete: bool) -> None:
    """Name the state of RES at this instant, so that it can be looked at later.

    Everything completed before is in it. The mark is durable at the primary when the command
    returns, travels with the stream, and its state is kept when history gets sparser. The state is
    as a crash at that instant would leave it: stop or freeze the application for more.

    \b
    [bold]Examples:[/bold]
      geomirror mark pg before-upgrade
      geomirror view create pg --at before-upgrade
      geomirror mark pg --list
      geomirror mark pg before-upgrade --delete
    """
    if is_list:
        if mark_name is not None or is_delete:
            raise UsageError("--list takes only the resource", hint=f"geomirror mark {name} --list")
        listed = app.call("mark.list", {"name": name})
        app.show(listed, lambda: _table(listed))
        return
    if mark_name is None:
        raise UsageError("a mark needs a name", hint=f"geomirror mark {name} before-upgrade")
    parameters = {"name": name, "mark": mark_name}
    if is_delete:
        gone = app.call("mark.delete", parameters)
        app.show(gone, f'mark "{mark_name}" of "{name}" is deleted')
        return
    made = app.call("mark.create", parameters, timeout_s=60)
    text = f'mark "{mark_name}" of "{name}": epoch {made["epoch"]}, {local(made["time"])}'
    app.show(made, text)


def _table(result: dict[str, Any]) -> str:
    if not result["marks"]:
        return f'"{result["resource"]}" has no marks'
    rows = [
        [each["name"], str(each["epoch"]), local(each["time"]), _here(each)]
        for each in reversed(result["marks"])
    ]
    return table(["MARK", "EPOCH", "TIME", f"ON {result['node']}"], rows)


def _here(mark: dict[str, Any]) -> str:
    if mark["viewable"]:
        return "can be viewed"
    return "held, not in the image yet or not any more" if mark["held"] else "never held here"
