"""Settings of packet-level links: what the text means, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import MS
from geomirror.errors import UsageError
from geomirror.lab.packet_scenario import PacketSettings, parse_packet_settings
from geomirror.limits import KIB

PLAIN = PacketSettings()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", PLAIN),
        ("rtt=80ms", PacketSettings(delay_ns=40 * MS)),
        ("delay=80ms,jitter=500us", PacketSettings(delay_ns=80 * MS, jitter_ns=MS // 2)),
        ("rate=100mbit", PacketSettings(rate_bits_per_second=10**8)),
        ("rate=unlimited", PLAIN),
        ("queue=64KiB", PacketSettings(queue_bytes=64 * KIB)),
        ("loss=1%", PacketSettings(loss=0.01)),
        ("burst=2%/20", PacketSettings(burst_loss=0.02, burst_packets=20)),
        ("burst=2%", PacketSettings(burst_loss=0.02)),
        ("reorder=1%/5ms", PacketSettings(reorder=0.01, reorder_ns=5 * MS)),
        ("reorder=0%", PLAIN),
        (" duplicate=0.1% , corrupt=0.01 ", PacketSettings(duplicate=0.001, corrupt=0.01)),
        ("mtu=1400", PacketSettings(mtu_bytes=1400)),
        ("mtu=unlimited", PLAIN),
    ],
)
def test_the_text_means(text: str, expected: PacketSettings) -> None:
    assert parse_packet_settings(text, PLAIN) == expected


@pytest.mark.parametrize(
    "text",
    [
        "colour=red",
        "cut=30%",
        "window=1MiB",
        "down=reset",
        "loss",
        "loss=101%",
        "loss=nan",
        "loss=-1%",
        "rtt=121s",
        "jitter=1year",
        "rate=101gbit",
        "queue=0",
        "queue=2000000MiB",
        "mtu=67",
        "mtu=65536",
        "reorder=1%",
        "reorder=1%/",
        "burst=2%/x",
        "burst=2%/nan",
        "burst=2%/0.5",
        "burst=60%/1",
        "burst=100%/5",
        "burst=1%/9999999",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_packet_settings(text, PLAIN)


def test_what_is_not_named_stays() -> None:
    first = parse_packet_settings("rtt=10ms,loss=5%", PLAIN)
    assert parse_packet_settings("loss=0%", first) == PacketSettings(delay_ns=5 * MS)


@given(
    settings=st.builds(
        PacketSettings,
        delay_ns=st.integers(0, 10**10),
        loss=st.floats(0, 1),
        burst_loss=st.floats(0, 0.5),
        burst_packets=st.floats(1, 1e6),
        mtu_bytes=st.sampled_from([0, 68, 1500]),
    )
)
def test_a_command_has_only_numbers_that_the_emulator_takes(settings: PacketSettings) -> None:
    words = dict(word.split("=") for word in settings.to_command().split())
    assert len(words) == 12
    for key in ("loss", "burst_enter", "burst_leave", "reorder", "duplicate", "corrupt"):
        assert 0 <= float(words.pop(key)) <= 1
    assert all(int(value) >= 0 for value in words.values())


def test_a_burst_loses_its_part_in_the_long_run() -> None:
    settings = PacketSettings(burst_loss=0.02, burst_packets=20)
    words = dict(word.split("=") for word in settings.to_command().split())
    enter, leave = float(words["burst_enter"]), float(words["burst_leave"])
    assert leave == pytest.approx(1 / 20)
    assert enter / (enter + leave) == pytest.approx(0.02)
