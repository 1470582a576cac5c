"""The command line without a daemon: mistakes, help, texts, and what the client imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from geomirror.cli import main
from geomirror.cli.advice import advise
from geomirror.cli.check import CRITICAL, OK, WARNING, judge
from geomirror.cli.join import read_token
from geomirror.cli.render import render_status
from geomirror.cli.resource import parse_backings
from geomirror.cli.units import format_bytes, format_seconds, parse_duration, parse_size
from geomirror.errors import UsageError


def peer(**changes):
    found = {
        "node": "west-1",
        "site": "west",
        "state": "Stream",
        "disk_state": "UpToDate",
        "ack": "completed",
        "in_sync": None,
        "position": {"epoch": 41},
        "lag": {"epochs": 0, "bytes": 0, "seconds": 0.0},
        "rpo_seconds": 0.2,
        "rate_bytes_per_second": 2048,
        "resyncs": 0,
        "eta_seconds": None,
        "pending": None,
        "reason": "",
    }
    return {**found, **changes}


def resource(**changes):
    found = {
        "name": "pg",
        "role": "primary",
        "state": "ok",
        "error": None,
        "journal": {"bytes_used": 1 << 20, "bytes_total": 1 << 30, "covers_seconds": 11400.0},
        "volumes": [{"name": "0", "size_bytes": 1 << 30, "nbd_uri": "nbd+unix:///pg/0?socket=/s"}],
        "position": {"epoch": 41, "lsn": 4096},
        "peers": [peer()],
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10G", 10 << 30),
        ("10g", 10 << 30),
        ("10GiB", 10 << 30),
        ("10GB", 10 * 10**9),
        ("1.5T", 3 << 39),
        ("512 MiB", 512 << 20),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1Q", "1e3", "10 G G", "0x10", "١G", "1..5G"])
def test_what_is_not_a_size(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("250ms", 0.25), ("1.5s", 1.5), ("10m", 600), ("7d", 604800)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1w", "1h30m"])
def test_what_is_not_a_duration(text):
    with pytest.raises(UsageError, match="not a duration"):
        parse_duration(text)


def test_numbers_as_people_read_them():
    assert [format_bytes(n) for n in (0, 1023, 1536, 150 << 20, 3 << 40, None)] == [
        *("0 B", "1023 B", "1.5 KiB", "150 MiB", "3.0 TiB", "-"),
    ]
    assert [format_seconds(s) for s in (0.26, 42, 190, 11400, 7200, 190800, None)] == [
        *("0.3 s", "42 s", "3 min 10 s", "3 h 10 min", "2 h", "2 d 5 h", "-"),
    ]


def test_backings_name_a_volume_or_the_first_one():
    found = parse_backings(("a=/dev/x", "b/1=/dev/y=z"))
    assert found == {"a": {"0": "/dev/x"}, "b": {"1": "/dev/y=z"}}
    for bad in (("a",), ("=/dev/x",), ("a=dev/x",), ("a=/x", "a/0=/y")):
        with pytest.raises(UsageError):
            parse_backings(bad)


def test_a_token_comes_from_exactly_one_place(tmp_path, monkeypatch):
    import io

    (tmp_path / "t").write_text("from-file\n")
    assert read_token(None, str(tmp_path / "t")) == "from-file"
    assert read_token("direct", None) == "direct"
    monkeypatch.setattr("sys.stdin", io.StringIO("from-stdin\n"))
    assert read_token("-", None) == "from-stdin"
    for arguments in ((None, None), ("x", str(tmp_path / "t")), (None, str(tmp_path / "none"))):
        with pytest.raises(UsageError):
            read_token(*arguments)


def test_status_reads_like_a_report():
    text = render_status({"node": "east-1", "site": "east", "resources": [resource()]})
    assert text.splitlines() == [
        "node east-1 at site east",
        "",
        "pg  primary  ok  epoch 41",
        "  volume 0  1.0 GiB  nbd+unix:///pg/0?socket=/s",
        "  journal 1.0 MiB of 1.0 GiB, covers 3 h 10 min at this churn",
        "  PEER    SITE  STATE   DISK      ACK        EPOCH  BEHIND  RPO    RATE       RESYNCS",
        "  west-1  west  Stream  UpToDate  completed  41     0 B     0.2 s  2.0 KiB/s  0",
        "  state: healthy",
        "  means: Every peer has a usable copy, at most 0.2 s old.",
        "  to do: Nothing to do.",
    ]
    empty = render_status({"node": "east-1", "site": "east", "resources": []})
    assert "geomirror resource create" in empty


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({"peers": []}, "alone", "no other copy"),
        ({"state": "opening"}, "opening", "recovered"),
        ({"state": "storage_full"}, "storage_full", "full"),
        ({"error": {"code": "x", "message": "torn", "hint": "mend"}}, "failed", "torn"),
        ({"peers": [peer(state="Disconnected")]}, "disconnected", "covers 3 h 10 min"),
        (
            {"peers": [peer(state="Disconnected", is_member=False)]},
            "secondary gone",
            "remove-secondary pg west-1",
        ),
        (
            {"peers": [peer(is_member=False)], "role": "secondary"},
            "primary gone",
            "failover pg --to east-1",
        ),
        ({"peers": [peer(state="Paused")]}, "paused", "resume pg --peer west-1"),
        ({"peers": [peer(state="Pending", pending="no disk")]}, "pending", "(no disk)"),
        ({"peers": [peer(state="Refused", reason="other size")]}, "refused", "other size"),
        ({"peers": [peer(disk_state="Inconsistent", eta_seconds=90.0)]}, "inconsistent", "1 min"),
        ({"peers": [peer(ack="durable", in_sync=False)]}, "out of sync", "without it"),
        ({"role": "secondary"}, "healthy", "read-only"),
        ({"role": "secondary", "peers": [peer(state="Disconnected")]}, "disconnected", "old"),
    ],
)
def test_every_state_has_its_sentences(changes, state, text):
    found = advise(resource(**changes), "east-1")
    assert found[0].state == state
    assert text in f"{found[0].meaning} {found[0].action}"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, OK),
        ({"peers": [peer(rpo_seconds=60.0)]}, WARNING),
        ({"peers": [peer(rpo_seconds=300.0)]}, CRITICAL),
        ({"peers": [peer(), peer(rpo_seconds=61.0)]}, WARNING),
        ({"peers": [peer(rpo_seconds=None)]}, WARNING),
        ({"peers": []}, WARNING),
        ({"peers": [peer(disk_state="Inconsistent")]}, CRITICAL),
        ({"error": {"code": "x", "message": "torn", "hint": ""}}, CRITICAL),
    ],
)
def test_check_judges_the_worst_peer(changes, code):
    assert judge(resource(**changes), 60.0, 300.0)[0] == code


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["status"], 3, "no daemon answers"),
        (["nonsense"], 2, "No such command"),
        (["resource", "create", "pg"], 2, "--primary"),
        (["resource", "create", "pg", "--primary", "a", "--size", "big"], 2, "not a size"),
        (["join"], 2, "TOKEN"),
        (["network", "show"], 4, "no network"),
        (["token", "create", "--site", "x"], 4, "no network"),
        (["token", "create", "--site", "x", "--role", "witness"], 5, "nothing for a witness"),
        (["token", "create", "--site", "x", "--role", "king"], 2, "king"),
        (["resource", "add-secondary", "pg"], 2, "which node?"),
        (["resource", "add-secondary", "pg", "a", "--node", "a"], 2, "which node?"),
        (["resource", "add-secondary", "pg", "--node", "a"], 3, "no daemon answers"),
        (["resource", "remove-secondary", "pg"], 2, "which node?"),
        (["resource", "set", "pg", "--peer", "a", "copies=2"], 2, "the same for all secondaries"),
        (["resource", "set", "pg", "--peer", "a", "ack=durable"], 3, "no daemon answers"),
        (["node", "run"], 4, "no network"),
        (["check", "pg"], 3, "no daemon answers"),
    ],
)
def test_mistakes_have_an_exit_code_and_say_what_to_do(tmp_path, capfd, arguments, code, text):
    directory = str(tmp_path / "none")
    assert main.run(["--data-dir", directory, *arguments]) == code
    plain = capfd.readouterr()
    assert text in plain.err + plain.out
    assert "Traceback" not in plain.err
    assert main.run(["--data-dir", directory, *arguments, "--json"]) == code
    document = json.loads(capfd.readouterr().out)
    assert document["schema_version"] == 1
    assert text in json.dumps(document)
    assert not Path(directory).exists()


def test_a_bug_is_one_line_and_exit_70_and_a_traceback_only_when_asked(monkeypatch, capfd):
    def fail(*_arguments, **_options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(main.root, "main", fail)
    assert main.run(["status"]) == 70
    assert "Traceback" not in capfd.readouterr().err
    assert main.run(["--debug", "status"]) == 70
    assert "Traceback" in capfd.readouterr().err


def test_help_shows_the_groups_and_an_example(capfd):
    assert main.run(["--help"]) == 0
    text = capfd.readouterr().out
    for words in ("Network", "Replication", "Observation", "geomirror token create"):
        assert words in text


def test_the_client_side_of_status_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from geomirror.cli.main import run;"
        f"run(['--data-dir', {str(tmp_path)!r}, 'status']);"
        "heavy = {'numpy', 'aiohttp', 'cryptography', 'structlog', 'asyncio'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b""


def test_python_without_assertions_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-O", "-m", "geomirror", "--help"], capture_output=True, check=False
    )
    assert done.returncode != 0
    assert b"python -O" in done.stderr


def test_the_module_of_each_command_loads_alone():
    """Other tests start commands where everything is loaded already."""
    program = (
        "import os, sys, rich_click\n"
        "for name in sys.argv[1:]:\n"
        "    if (pid := os.fork()) == 0:\n"
        "        __import__(name)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(pid, 0)[1]:\n"
        "        sys.exit(name)\n"
    )
    modules = sorted({module for panel in main.PANELS.values() for module in panel.values()})
    command = [sys.executable, "-c", program, *modules, "geomirror.node.run_io"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
