"""Figures and charts of the demo."""

import json

from geomirror.lab.demo_report import Report, bars, chart, percentile, squeeze
from geomirror.lab.demo_sampler import Counter


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
