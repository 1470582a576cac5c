"""The benchmarks run, judge themselves and write what the documentation is made from."""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import BENCHMARKS, MEASUREMENTS, published
from bench.cells import ROOT, code_digest, is_done, parameters, verdict
from bench.document import render, section, update
from bench.fio import Load
from bench.options import Options
from bench.quiet import BEFORE_MAX, Disturbance, Process, others_ticks
from bench.report import Result, write
from geomirror.errors import NotFoundError
from geomirror.lab.process_io import run

MACHINE = {
    "load_average_before": 0.1,
    "is_quiet": True,
    "busy_before": 0.01,
    "others_part": 0.0,
    "stolen_part": 0.0,
}


def document(result: Result, cell: str = "", **machine: Any) -> dict[str, Any]:
    """As the runner completes it."""
    added = {
        "cell": cell,
        "options": {"is_short": False, "rounds": None, "seconds": None},
        "commit": "0123abcd",
        "code": "4567",
        "began_utc": "2026-01-31T12:00:00+00:00",
        "seconds": 2.0,
        "machine": {**MACHINE, **machine},
    }
    found = {**result.to_json(), **added}
    return {**found, "verdict": verdict(found)}


def need_fio() -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")


def bench(out: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "bench", "--short", "--out", str(out), *arguments]
    command += ["--directory", str(out)]
    output = asyncio.run(run(command, timeout_s=100))
    assert output.returncode == 0, (output.stdout + output.stderr).decode()
    assert not list(out.glob("work-*")), "its files are still there"
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.system
def test_a_short_run_in_a_lab_writes_valid_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_fio()
    monkeypatch.chdir(ROOT)
    found = bench(tmp_path, "--only", "link_use", "--seconds", "0.5", "--rounds", "1")
    result = found["link_use"]
    assert result["verdict"] in ("ok", "not quiet"), result["invalid_because"]
    assert set(result["peer_states"]) <= {"Stream", "Fold"}
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert figures["frames received / link"]["value"] > 0.05
    assert figures["median lag under half load"]["bound"] == "≤ 0.455"
    assert result["versions"]["fio"].startswith("fio-")
    assert result["machine"]["cpus"] >= 1


@pytest.mark.system
def test_a_resync_of_scattered_blocks_sends_little_more_than_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_fio()
    monkeypatch.chdir(ROOT)
    # The other one begins after the time that a peer stays with its bitmap.
    result = bench(tmp_path, "--only", "resync.unknown")["resync.unknown"]
    assert result["verdict"] in ("ok", "not quiet"), result["invalid_because"]
    assert [figure["name"] for figure in result["figures"] if figure["is_met"] is False] == []


@pytest.mark.system
@pytest.mark.parametrize("cell", ["first_write", "unapplied", "views", "rewind", "failback"])
def test_a_short_failover_is_measured(
    cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_fio()
    monkeypatch.chdir(ROOT)
    result = bench(tmp_path, "--only", f"failover.{cell}")[f"failover.{cell}"]
    assert result["verdict"] in ("ok", "not quiet"), result["invalid_because"]
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert all(figure["value"] > 0 for figure in figures.values())
    if cell == "failback":
        assert figures["wire bytes / written at the promoted copy"]["is_met"]
        assert result["rounds"][0]["branch"].startswith("orphan-")


@pytest.mark.system
def test_the_simulator_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = bench(tmp_path, "--only", "simulator")
    assert found["simulator"]["figures"][0]["value"] > 1


@pytest.mark.system
def test_single_operations_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = bench(tmp_path, "--only", "costs")["costs"]
    assert result["verdict"] in ("ok", "not quiet"), result["invalid_because"]
    assert len(result["figures"]) >= 14
    assert all(figure["value"] > 0 for figure in result["figures"])


@pytest.mark.system
def test_history_is_measured_by_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = bench(tmp_path, "--only", "history", "--rounds", "1")
    levels, turns = found["history.levels"], found["history.apply"]
    for result in (levels, turns, found["history.full"], found["history.rewind"]):
        assert result["verdict"] in ("ok", "not quiet"), result["invalid_because"]
    points = [row[3] for row in levels["table"]["rows"]]
    assert all(points[:2])
    assert points[0] >= 4
    figures = {figure["name"]: figure["value"] for figure in levels["figures"]}
    assert figures["written per byte received: journal"] > 1
    assert figures["written per byte received: image"] > 0.9
    assert 0 < figures["written per byte received: before-images"] < 1.1
    assert figures["written per byte received: thinning of history"] > 0
    back = {figure["name"]: figure["value"] for figure in found["history.rewind"]["figures"]}
    assert back["volume as at the beginning"] == 1
    ratio = turns["figures"][0]
    assert (ratio["bound"], ratio["value"] > 0.05) == ("≥ 0.5", True)


def test_a_run_whose_peer_left_the_stream_does_not_count() -> None:
    result = Result("x", "X")
    result.judge_states({"Stream", "Disconnected"}, ("Disconnected",))
    assert result.is_valid
    result.judge_states({"Fold", "Bitmap"})
    assert not result.is_valid
    assert result.invalid_because == ["the peer was in Bitmap"]
    assert result.peer_states == {"Stream", "Disconnected", "Fold", "Bitmap"}


def test_a_figure_is_the_median_and_knows_its_worst_round() -> None:
    result = Result("x", "X")
    result.at_least("rate", [0.5, 0.9, 2.0], 0.8)
    result.at_most("time", [1.0, 5.0, 2.0], 1.5, "s")
    result.every_below("start", [2.0, 2.5, 3.0], 3, "s")
    result.every_below("stop", [2.0, 2.5, 2.999], 3, "s")
    rate, time, start, stop = result.figures
    assert (start.value, start.bound, start.is_met, start.worst) == (2.5, "every < 3", False, 3.0)
    assert stop.is_met
    assert (rate.value, rate.is_met, rate.worst, rate.best) == (0.9, True, 0.5, 2.0)
    assert (time.value, time.is_met, time.worst, time.best) == (2.0, False, 5.0, 1.0)


def test_figures_go_between_the_marks_of_their_benchmark(tmp_path: Path) -> None:
    result = Result("x", "X")
    result.at_least("rate", [0.9], 0.8)
    result.columns, result.rows = ["load", "server", "req/s"], [["4k", "nbdkit", 12345.0]]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: x -->\nold\n<!-- end: x -->\nafter\n")
    update(page, [document(result)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end: x -->\nafter\n")
    assert "old" not in text
    assert "| 4k | nbdkit | 12,345 |" in text
    assert "| rate | 0.900 x | 0.900 … 0.900 | ≥ 0.8 | met |" in text
    update(page, [document(result)])
    assert page.read_text() == text
    with pytest.raises(NotFoundError):
        update(page, [document(Result("y", "Y"))])
    assert "rate" in render([document(result)])


def test_the_page_has_a_place_for_every_benchmark() -> None:
    text = MEASUREMENTS.read_text()
    for name in BENCHMARKS:
        assert text.count(f"<!-- begin: {name} -->") == 1
        assert text.count(f"<!-- end: {name} -->") == 1


def test_a_load_ends_by_bytes_or_by_time_and_flushes_only_if_asked() -> None:
    bound = Load("randwrite", 4096, 1, 0, 1 << 20, 1 << 19, has_flush_each=True)
    assert "--io_size=524288" in bound.arguments("nbd://x")
    assert "--fsync=1" in bound.arguments("nbd://x")
    timed = Load("randread", 4096, 32, 0.5, 1 << 20).arguments("nbd://x")
    assert "--runtime=500ms" in timed
    assert "--time_based" in timed
    assert not any(part.startswith("--fsync") for part in timed)


def test_cells_have_labels_of_their_own() -> None:
    labels = [cell.label for cells in BENCHMARKS.values() for cell in cells]
    assert len(labels) == len(set(labels))
    assert all(cell.benchmark == name for name, cells in BENCHMARKS.items() for cell in cells)


def test_a_result_is_kept_until_code_or_options_change_or_it_was_disturbed(tmp_path: Path) -> None:
    options = Options(tmp_path, rounds=3)
    path = tmp_path / "x.json"
    assert not is_done(path, options, "4567")
    found = {**document(Result("x", "X")), "options": parameters(options)}
    write(path, found)
    assert is_done(path, options, "4567")
    assert not is_done(path, options, "89ab")
    assert not is_done(path, Options(tmp_path, rounds=4), "4567")
    for worse in ({"verdict": "not quiet"}, {"schema_version": 1}):
        write(path, {**found, **worse})
        assert not is_done(path, options, "4567")
    path.write_text('{"half a')
    assert not is_done(path, options, "4567")


def test_a_digest_of_the_code_is_stable() -> None:
    assert code_digest() == code_digest()


def test_a_disturbed_run_is_marked_in_the_page() -> None:
    quiet = document(Result("x", "X"), "one")
    loud = document(Result("x", "X"), "two", is_quiet=False, others_part=0.44)
    assert (quiet["verdict"], loud["verdict"]) == ("ok", "not quiet")
    text = render([quiet, loud])
    assert "**Not quiet** (two): 1% in use before, 44% by others meanwhile." in text
    assert "(one)" not in text


def test_work_of_others_is_told_from_our_own_and_the_kernels() -> None:
    before = {
        (1, "0"): Process(0, 10),
        (50, "5"): Process(1, 100),  # we
        (60, "6"): Process(1, 1000),  # somebody else
        (70, "7"): Process(2, 500),  # the kernel
        (80, "8"): Process(60, 40),  # ends, having spent 5 more
    }
    after = {
        (1, "0"): Process(0, 500),  # reaped a daemon of ours
        (50, "5"): Process(1, 900),
        (51, "9"): Process(50, 300),  # our child
        (52, "9"): Process(51, 300),  # and its child
        (60, "6"): Process(1, 1007 + 45),
        (70, "7"): Process(2, 800),
        (80, "9"): Process(60, 30),  # a new one with an old pid
    }
    assert others_ticks(before, after, own_pid=50) == 7 + 5 + 30


def test_a_busy_machine_is_not_quiet() -> None:
    assert Disturbance(BEFORE_MAX).is_quiet
    assert not Disturbance(BEFORE_MAX + 0.01).is_quiet


def test_the_page_is_made_from_the_published_results() -> None:
    for name in BENCHMARKS:
        if documents := published(name):
            assert section(MEASUREMENTS, name) == render(documents), name
