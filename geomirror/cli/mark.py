"""`geomirror mark`: a name for the state of this instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app, refuse_others, table
from geomirror.cli.quiesce import Plan, Quiescence, not_made
from geomirror.cli.timeline import local
from geomirror.cli.units import parse_duration
from geomirror.errors import GeomirrorError, RefusedError, UsageError

TIMEOUT = "30s"
TIMEOUT_S_MAX = 3600.0


@click.command()
@click.argument("name", metavar="RES")
@click.argument("mark_name", metavar="[NAME]", required=False)
@click.option("--list", "is_list", is_flag=True, help="Show all marks, and who holds them.")
@click.option("--delete", "is_delete", is_flag=True, help="Take the mark back, everywhere.")
@click.option(
    "--pre",
    multiple=True,
    metavar="CMD",
    help="Run this shell command before, here; may be given more than once, run in order.",
)
@click.option(
    "--post",
    multiple=True,
    metavar="CMD",
    help="Run this one afterwards, whatever happened, if the --pre at its place was started. In "
    "reverse order.",
)
@click.option(
    "--fsfreeze",
    "freeze",
    multiple=True,
    metavar="MOUNTPOINT",
    help="Freeze this file system meanwhile, at the primary (root only); it is thawed also if this "
    "command is killed.",
)
@click.option(
    "--timeout",
    "timeout",
    metavar="TIME",
    help=f"Of each command, of the mark or its deletion, and of the freeze. Default: {TIMEOUT}.",
)
@click.option(
    "--allow-crash-consistent",
    "is_crash_allowed",
    is_flag=True,
    help="Make the mark also when the application cannot be quiesced.",
)
@json_option
@pass_app
def mark(
    app: App,
    name: str,
    mark_name: str | None,
    is_list: bool,
    is_delete: bool,
    pre: tuple[str, ...],
    post: tuple[str, ...],
    freeze: tuple[str, ...],
    timeout: str | None,
    is_crash_allowed: bool,
) -> int:
    """Name the state of RES at this instant, so that it can be looked at later.

    Everything completed before is in it. The mark is durable at the primary when the command
    returns, travels with the stream, and its state is kept when history gets sparser. The state is
    as a crash at that instant would leave it, unless --pre or --fsfreeze quiesce the application
    first: if all of that succeeds, the mark is application-consistent. Commands run on this node,
    as you. They get GEOMIRROR_RESOURCE and GEOMIRROR_MARK, those of --post GEOMIRROR_MARK_RESULT
    (made, failed or unknown) and GEOMIRROR_EPOCH, too. Exits 1 when the mark is there and
    something else failed. More in docs/marks.md.

    \b
    [bold]Examples:[/bold]
      geomirror mark pg before-upgrade
      geomirror view create pg --at before-upgrade
      geomirror mark pg nightly --fsfreeze /srv/pg
      geomirror mark db v7 --pre "redis-cli save" --post "logger marked"
      geomirror mark pg --list
      geomirror mark pg before-upgrade --delete
    """
    plan = Plan(pre, post, freeze, parse_duration(timeout or TIMEOUT))
    quiescing: dict[str, object] = {"pre": pre, "post": post, "fsfreeze": freeze}
    quiescing["allow-crash-consistent"] = is_crash_allowed
    if is_list:
        return _list(app, name, mark_name, {"delete": is_delete, **quiescing, "timeout": timeout})
    if is_delete:
        hint = f"geomirror mark {name} {mark_name or 'NAME'} --delete"
        refuse_others("--delete", quiescing, "nothing is quiesced for it", hint)
    elif is_crash_allowed and plan.is_empty:
        raise UsageError("--allow-crash-consistent: without hooks every mark is crash-consistent")
    parameters = _parameters(name, mark_name, plan.timeout_s)
    if not is_delete:
        made, exit_code = _make(app, parameters, plan, is_crash_allowed)
        app.show(made, lambda: _made(made))
        return exit_code
    gone = app.call("mark.delete", parameters, timeout_s=plan.timeout_s + 15)
    app.show(gone, f'mark "{mark_name}" of "{name}" is deleted')
    return 0


def _list(app: App, name: str, mark_name: str | None, given: Mapping[str, object]) -> int:
    """Show all marks. :raises UsageError: `given` has options that are of a new one."""
    hint = f"geomirror mark {name} --list"
    if mark_name is not None:
        raise UsageError("--list takes only the resource", hint=hint)
    refuse_others("--list", given, "it makes no mark", hint)
    listed = app.call("mark.list", {"name": name})
    app.show(listed, lambda: _table(listed))
    return 0


def _parameters(name: str, mark_name: str | None, timeout_s: float) -> dict[str, Any]:
    if mark_name is None:
        raise UsageError("a mark needs a name", hint=f"geomirror mark {name} before-upgrade")
    if not 0 < timeout_s <= TIMEOUT_S_MAX:
        raise UsageError(f"--timeout of {timeout_s:g} s: more than zero, at most an hour")
    return {"name": name, "mark": mark_name, "timeout_s": timeout_s}


def _make(
    app: App, parameters: dict[str, Any], plan: Plan, is_crash_allowed: bool
) -> tuple[dict[str, Any], int]:
    """Quiesce, mark, let go, and only then say durably that the application was quiet.

    :returns: the mark with its problems, and the exit code.
    """
    timeout_s = plan.timeout_s + 15
    if plan.is_empty:
        return {**app.call("mark.create", parameters, timeout_s=timeout_s), "problems": []}, 0
    name, mark_name = parameters["name"], parameters["mark"]
    plan.check(app.data_dir.root)
    if plan.freeze:
        _check_primary(app, name)
    environment = {"GEOMIRROR_RESOURCE": name, "GEOMIRROR_MARK": mark_name}
    plan = replace(plan, environment=environment, is_crash_allowed=is_crash_allowed)
    with Quiescence(plan) as quiescence:
        failures = quiescence.begin()
        if failures and not is_crash_allowed:
            more = quiescence.end("failed", None)[1]
            raise not_made(mark_name, [*failures, *(each for each in more if each not in failures)])
        made = app.call("mark.create", parameters, timeout_s=timeout_s)
        is_quiet, later = quiescence.end("made", made["epoch"])
    is_failed = bool(later)
    if not failures and not is_quiet:
        later.append("the application was let go before the mark was there, after its time")
    # A failed post command may be how an application says that it was not quiet.
    if not failures and not later and (plan.pre or plan.freeze):
        try:
            confirm = {**parameters, "epoch": made["epoch"]}
            made = app.call("mark.confirm", confirm, timeout_s=timeout_s)
        except GeomirrorError as error:
            later.append(f"it could not be noted that the application was quiet: {error.message}")
    problems = [*failures, *later]
    is_failed |= bool(problems) and not is_crash_allowed
    return {**made, "problems": problems}, int(is_failed)


def _check_primary(app: App, name: str) -> None:
    """Freezing here says something only where the volume is written.

    :raises RefusedError: that is another node.
    """
    definition = app.call("resource.show", {"name": name})
    primary = definition["definition"]["primary"]
    if definition["status"]["role"] != "primary":
        raise RefusedError(
            f'--fsfreeze: "{name}" is written on {primary}, not here',
            hint=f"run this on {primary}, or freeze there with --pre and --post",
        )


def _made(made: dict[str, Any]) -> str:
    text = (
        f'mark "{made["name"]}" of "{made["resource"]}": epoch {made["epoch"]}, '
        f"{local(made['time'])}, {made['consistency']}-consistent"
    )
    return "\n".join([text, *(f"  problem: {each}" for each in made["problems"])])


def _table(result: dict[str, Any]) -> str:
    if not result["marks"]:
        return f'"{result["resource"]}" has no marks'
    members = [each["node"] for each in result["marks"][0]["members"]]
    rows = [
        [
            each["name"],
            str(each["epoch"]),
            local(each["time"]),
            each["consistency"],
            *(_state(member) for member in each["members"]),
        ]
        for each in reversed(result["marks"])
    ]
    notes = [
        f"{each['name']} on {member['node']}: {member['reason']}"
        for each in reversed(result["marks"])
        for member in each["members"]
        if member["reason"] and member["known"] is not None
    ]
    unheard = {
        f"{member['node']}: {member['reason']}"
        for each in result["marks"]
        for member in each["members"]
        if member["known"] is None
    }
    headings = ["MARK", "EPOCH", "TIME", "CONSISTENCY", *(name.upper() for name in members)]
    return "\n".join([table(headings, rows), *sorted(unheard), *notes])


def _state(member: dict[str, Any]) -> str:
    if member["held"] is None:
        return "not known"
    if member["viewable"]:
        return "can be viewed"
    return "held, not applied yet" if member["held"] else "not held"
