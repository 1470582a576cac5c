"""`geomirror status`"""

from __future__ import annotations

import rich_click as click

from geomirror.cli.common import App, json_option, pass_app


@click.command()
@click.argument("name", metavar="[RES]", required=False)
@json_option
@pass_app
def status(app: App, name: str | None) -> None:
    """Show resources, peers and what to do, as this node sees them.

    Exits 0 when the daemon answers, whatever the health; use `check` to judge it.
    """
    result = app.call("status", {"name": name}, timeout_s=15)

    def text() -> str:
        from geomirror.cli.render import render_status

        return render_status(result)

    app.show(result, text)
