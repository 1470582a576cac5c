"""Figures and charts of the demo."""

import json

import pytest
from rich.console import Console

from geomirror.lab.demo_report import Report, bars, chart, percentile, squeeze
from geomirror.lab.demo_sampler import Counter
from geomirror.lab.demo_summary import sentences, show_report
from geomirror.lab.demo_view import View


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.50) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([3.0], 0.99) == 3
    assert percentile([], 0.5) == 0


def test_a_long_series_keeps_its_peaks_when_squeezed() -> None:
    values = [0.0] * 1000
    values[617] = 9.0
    assert max(squeeze(values, 20)) == 9.0
    assert len(squeeze(values, 20)) == 20
    assert squeeze([1.0, 2.0], 20) == [1.0, 2.0]


def test_charts_reach_from_nothing_to_a_full_block() -> None:
    assert bars([0.0, 1.0, 8.0], 10, 8.0) == " ▁█"
    assert bars([], 10, 0.0) == ""
    assert chart([0.0, 4.0, 8.0], 10, 2, 8.0) == ["  █", " ██"]


def test_a_report_passes_only_with_checks_that_all_hold() -> None:
    report = Report()
    assert not report.passed
    report.check("first", True)
    assert report.passed
    report.check("second", False, "because")
    report.check("second", True)
    assert not report.passed
    document = json.loads(json.dumps(report.to_json()))
    assert document["checks"] == {"first": True, "second": False}
    assert document["notes"] == {"second": "because"}


def test_a_counter_goes_on_when_its_process_starts_again() -> None:
    counter = Counter()
    for value in (0, 10, 25, 3, 8):
        counter.see(value)
    assert counter.total == 33


def test_checks_belong_to_the_act_in_which_they_were_first_made() -> None:
    report = Report()
    assert report.begin_act("one") == 1
    report.check("a", True)
    assert report.begin_act("two") == 2
    report.check("b", True)
    report.check("a", True)
    assert report.to_json()["acts"] == {"one": ["a"], "two": ["b"]}


def whole_report() -> Report:
    report = Report()
    report.begin_act("A mirror")
    for number in range(12):
        report.check(f"mirror_{number}_has_every_flushed_write", True)
    report.begin_act("The way back")
    report.check("failback_without_resync", False, "2 resyncs")
    names = (
        *("writes", "flaps", "kills", "lag_seconds_p50", "lost_confirmed_writes"),
        *("view_seconds", "failover_seconds", "failover_lost_writes", "failback_seconds"),
        *("failback_bytes", "divergence_bytes", "image_bytes", "switchover_seconds"),
    )
    report.figures |= {name: 1.5 if "seconds" in name else 3 << 20 for name in names}
    return report


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_end_fits_into_any_window_and_says_what_failed(width: int) -> None:
    console = Console(width=width, record=True, quiet=False, force_terminal=False)
    with console.capture() as captured:
        show_report(console, whole_report(), {"west-1": [0.1, 4.0, 0.2]}, "report.json")
    text = captured.get()
    assert max(map(len, text.splitlines())) <= width
    assert "12 of 13 checks hold" in text
    assert "failback without resync: 2 resyncs" in text
    assert "FAILED" in text
    joined = " ".join(text.split())
    assert "3.0 MiB crossed the links for 3.0 MiB of divergence" in joined


def test_an_unfinished_demo_says_only_what_it_knows() -> None:
    assert sentences({}) == []
    assert [subject for subject, _ in sentences({"view_seconds": 0.5})] == ["view"]


def test_facts_stand_below_their_step_and_a_failed_step_is_marked() -> None:
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured, View(console, Report()) as view:
        view.act("A mirror", "one disk at three sites")
        with view.step("first"):
            view.command("east-1", "geomirror status")
            view.fact("it was so")
        with pytest.raises(ValueError, match="no"), view.step("second"):
            raise ValueError("no")
    lines = [line.rstrip() for line in captured.get().splitlines() if line.strip()]
    assert lines[0].startswith("1 A mirror")
    assert "east-1 $ geomirror status" in lines[1]
    assert lines[2].startswith("  ✓ first")
    assert lines[3] == "      it was so"
    assert lines[4].startswith("  ✗ second")
