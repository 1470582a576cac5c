"""Documents that are made from the code; `python -m tests.cli.documents` writes them anew."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import rich_click as click

from geomirror.cli.main import root
from geomirror.errors import ProtocolError, all_errors
from geomirror.node.error_json import error_word

DOCS = Path(__file__).parent.parent.parent / "docs"
MARK = "<!-- From here on made by `python -m tests.cli.documents`. -->\n"

EXIT_CODES_HEAD = """# Exit codes

Made from the table in `geomirror/errors.py` by `python -m tests.cli.documents`; a test compares
the two. Scripts may rely on the codes and on the word in `error.code` of `--json`.

| exit code | `error.code` | meaning | try again |
| --- | --- | --- | --- |
| 0 |  | Done. `status` exits 0 whenever the daemon answers, whatever the health. |  |
"""
EXIT_CODES_TAIL = """| 130 |  | Interrupted from the keyboard. |  |

`check` has the codes of monitoring plug-ins instead: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
"""


def exit_codes() -> str:
    rows = []
    for kind in sorted(all_errors(), key=lambda found: (found.exit_code, found.wire_code)):
        if kind is not ProtocolError:
            meaning = (kind.__doc__ or "").splitlines()[0]
            retry = "yes" if kind.is_retryable else ""
            rows.append(f"| {kind.exit_code} | `{error_word(kind)}` | {meaning} | {retry} |\n")
    return EXIT_CODES_HEAD + "".join(rows) + EXIT_CODES_TAIL


def commands() -> list[tuple[str, click.Command]]:
    """Every command with its words, groups left out, in the order of the help text."""
    found: list[tuple[str, click.Command]] = []

    def walk(words: str, command: click.Command) -> None:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                walk(f"{words} {name}", inner)
        else:
            found.append((words, command))

    walk("geomirror", root)
    return found


def reference() -> str:
    return "".join(_section(words, command) for words, command in commands())


def _section(words: str, command: click.Command) -> str:
    context = click.Context(command, info_name=words)
    usage = " ".join(command.collect_usage_pieces(context))
    text = re.sub(r"\[/?(bold|dim)\]", "", inspect.cleandoc(command.help or "").replace("\b\n", ""))
    lines = [f"### {words}", f"`{words} {usage}`", ""]
    is_example = False
    for line in text.splitlines():
        if line.strip() and line.startswith("  ") != is_example:
            lines.append("```")
            is_example = not is_example
        lines.append(line)
    if is_example:
        lines.append("```")
    lines.append("")
    for parameter in command.params:
        if isinstance(parameter, click.Option) and "--json" not in parameter.opts:
            record = parameter.get_help_record(context)
            assert record is not None
            lines.append(f"- `{record[0]}` {record[1]}")
    return "\n".join(lines).rstrip() + "\n\n"


def cli_document() -> str:
    head = (DOCS / "cli.md").read_text().partition(MARK)[0]
    return (head + MARK + "\n" + reference()).rstrip() + "\n"


if __name__ == "__main__":
    (DOCS / "exit_codes.md").write_text(exit_codes())
    (DOCS / "cli.md").write_text(cli_document())
