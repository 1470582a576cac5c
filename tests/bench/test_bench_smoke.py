"""The benchmarks run, judge themselves and write what the documentation is made from."""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import BENCHMARKS, MEASUREMENTS
from bench.document import render, update
from bench.fio import Load
from bench.report import Result
from geomirror.errors import NotFoundError
from geomirror.lab.process_io import run

ROOT = Path(__file__).parent.parent.parent


def document(result: Result) -> dict[str, Any]:
    """As the runner completes it."""
    added = {
        "command": "python -m bench",
        "began_utc": "2026-01-31T12:00:00+00:00",
        "seconds": 2.0,
        "machine": {"load_average_before": 0.1},
    }
    return {**result.to_json(), **added}


def bench(out: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "bench", "--short", "--out", str(out), *arguments]
    output = asyncio.run(run(command, timeout_s=90))
    assert output.returncode == 0, (output.stdout + output.stderr).decode()
    assert not list(out.glob("work-*")), "its files are still there"
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.system
def test_a_short_run_in_a_lab_writes_valid_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    monkeypatch.chdir(ROOT)
    found = bench(tmp_path, "--only", "link_use", "--seconds", "0.5", "--rounds", "1")
    result = found["link_use"]
    assert result["is_valid"], result["invalid_because"]
    assert set(result["peer_states"]) <= {"Stream", "Fold"}
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert figures["frames received / link"]["value"] > 0.05
    assert figures["median lag under half load"]["bound"] == "≤ 0.455"
    assert result["versions"]["fio"].startswith("fio-")
    assert result["machine"]["cpus"] >= 1


@pytest.mark.system
def test_the_simulator_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = bench(tmp_path, "--only", "simulator")
    assert found["simulator"]["figures"][0]["value"] > 1


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
    rate, time = result.figures
    assert (rate.value, rate.is_met, rate.worst, rate.best) == (0.9, True, 0.5, 2.0)
    assert (time.value, time.is_met, time.worst, time.best) == (2.0, False, 5.0, 1.0)


def test_figures_go_between_the_marks_of_their_benchmark(tmp_path: Path) -> None:
    result = Result("x", "X")
    result.at_least("rate", [0.9], 0.8)
    result.columns, result.rows = ["load", "server", "req/s"], [["4k", "nbdkit", 12345.0]]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: x -->\nold\n<!-- end: x -->\nafter\n")
    update(page, document(result))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end: x -->\nafter\n")
    assert "old" not in text
    assert "| 4k | nbdkit | 12,345 |" in text
    assert "| rate | 0.900 x | 0.900 … 0.900 | ≥ 0.8 | met |" in text
    update(page, document(result))
    assert page.read_text() == text
    with pytest.raises(NotFoundError):
        update(page, document(Result("y", "Y")))
    assert "rate" in render(document(result))


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


def test_every_benchmark_is_a_coroutine_function() -> None:
    assert all(asyncio.iscoroutinefunction(function) for function in BENCHMARKS.values())
