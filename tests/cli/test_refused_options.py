"""Options that would mean nothing are refused, with the reason; before any daemon is asked."""

from __future__ import annotations

import pytest

from geomirror.cli import main


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["view", "create", "pg", "--quota", "1G"], "--writable only"),
        (["drill", "pg", "--history", "--timeout", "5s"], "no --timeout: it runs no drill"),
        (["drill", "pg", "--history", "--quota", "1G"], "no --quota"),
        (["drill", "pg", "--history", "--no-mount"], "no --no-mount"),
        (["drill", "pg", "--history", "--volume", "1"], "no --volume"),
        (["drill", "pg", "--history", "--check", "true", "--at", "-1m"], "no --check and no --at"),
        (["verify", "pg", "--stop", "--rate", "1M"], "no --rate: it begins nothing"),
        (["verify", "pg", "--stop", "--wait", "--no-heal"], "no --wait and no --no-heal"),
        (["mark", "pg", "--list", "--allow-crash-consistent"], "no --allow-crash-consistent"),
        (["mark", "pg", "--list", "--timeout", "5s"], "no --timeout: it makes no mark"),
        (["mark", "pg", "--list", "--delete"], "no --delete"),
        (["mark", "pg", "x", "--list"], "only the resource"),
        (["mark", "pg", "x", "--delete", "--allow-crash-consistent"], "nothing is quiesced"),
        (["mark", "pg", "x", "--delete", "--pre", "true"], "no --pre: nothing is quiesced"),
        (["mark", "pg", "x", "--allow-crash-consistent"], "every mark is crash-consistent"),
        (["rewind", "rollback", "pg", "--to", "-1m"], "takes no --to"),
    ],
)
def test_an_option_that_means_nothing_is_refused(tmp_path, capfd, arguments, text):
    assert main.run(["--data-dir", str(tmp_path / "none"), *arguments]) == 2
    assert text in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["view", "create", "pg", "--writable", "--quota", "1G"],
        ["drill", "pg", "--history"],
        ["verify", "pg", "--stop"],
        ["mark", "pg", "x", "--delete", "--timeout", "5s"],
        ["rewind", "rollback", "pg", "--dry-run"],
    ],
)
def test_what_means_something_reaches_the_daemon(tmp_path, capfd, arguments):
    assert main.run(["--data-dir", str(tmp_path / "none"), *arguments]) == 3
    assert "no daemon answers" in capfd.readouterr().err
