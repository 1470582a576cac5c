"""The times that an emulated link decides, with a clock in hand."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomirror.environment import MS, SECOND, SeededEntropy
from geomirror.errors import UsageError
from geomirror.lab.link_model import DirectionModel, StreamModel, next_try_ns
from geomirror.lab.scenario import (
    WAN,
    LinkSettings,
    parse_link,
    parse_link_name,
    parse_settings,
    parse_time_ns,
)

PLAIN = LinkSettings()


def direction(text: str, seed: int = 1) -> DirectionModel:
    return DirectionModel(parse_settings(text, PLAIN), SeededEntropy(seed))


def test_settings_of_a_link_are_read_with_their_units() -> None:
    settings = parse_settings("rtt=80ms,rate=100mbit,jitter=2ms,loss=0.5%,queue=1MiB", PLAIN)
    assert settings.delay_ns == 40 * MS
    assert settings.jitter_ns == 2 * MS
    assert settings.rate_bits_per_second == 100_000_000
    assert settings.loss == pytest.approx(0.005)
    assert settings.queue_bytes == 1 << 20
    assert parse_settings("delay=1s,rate=unlimited", WAN).rate_bits_per_second == 0


@pytest.mark.parametrize(
    "text",
    ["rtt=fast", "rate=100", "speed=1", "loss=200%", "down=maybe", "queue=1", "rtt", "jitter=1h"],
)
def test_settings_without_meaning_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_settings(text, PLAIN)


@given(st.text(max_size=40))
def test_any_text_is_settings_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(parse_settings(text, PLAIN), LinkSettings)
    with contextlib.suppress(UsageError):
        assert parse_time_ns(text) >= 0


def test_a_link_is_named_by_its_nodes_though_they_hold_hyphens() -> None:
    nodes = ["east-1", "west-1", "colo"]
    assert parse_link_name("east-1-west-1", nodes) == ("east-1", "west-1")
    assert parse_link("colo-east-1:rtt=10ms", nodes, PLAIN)[2].delay_ns == 5 * MS
    for wrong in ("east-1", "east-1-east-1", "colo-nowhere", ""):
        with pytest.raises(UsageError):
            parse_link_name(wrong, nodes)


def test_delay_and_rate_add_up() -> None:
    model, stream = direction("delay=40ms,rate=100mbit"), StreamModel()
    assert model.offer(stream, 125_000, now_ns=0) == 50 * MS  # 10 ms on the wire, 40 ms of way
    assert model.offer(stream, 125_000, now_ns=0) == 60 * MS
    assert model.backlog_bytes(now_ns=10 * MS) == 125_000
    assert model.offer(stream, 125_000, now_ns=SECOND) == SECOND + 50 * MS


def test_a_slow_line_has_little_under_way() -> None:
    model = direction("rtt=80ms,rate=10mbit,queue=64KiB,window=4MiB")
    assert model.window_bytes() == 100_000 + 64 * 1024
    model.change(parse_settings("rate=10gbit", model.settings))
    assert model.window_bytes() == 4 << 20
    assert direction("window=1MiB").window_bytes() == 1 << 20


def test_two_connections_share_the_rate_of_their_direction() -> None:
    model, streams = direction("rate=100mbit"), (StreamModel(), StreamModel())
    last = [model.offer(stream, 125_000, now_ns=0) for stream in streams * 10][-1]
    assert last == 200 * MS


def test_a_connections_bytes_stay_in_order_under_jitter_and_loss() -> None:
    model, stream = direction("delay=20ms,jitter=10ms,loss=5%,rate=100mbit"), StreamModel()
    times = [model.offer(stream, 1448, now_ns=index * MS) for index in range(500)]
    assert times == sorted(times)
    assert model.lost_packets > 5


def test_equal_seeds_give_equal_times_and_others_do_not() -> None:
    def times(seed: int) -> list[int]:
        model, stream = direction("delay=20ms,jitter=10ms,loss=1%", seed), StreamModel()
        return [model.offer(stream, 4096, now_ns=index * MS) for index in range(200)]

    assert times(7) == times(7)
    assert times(7) != times(8)


def test_losses_are_as_frequent_as_asked() -> None:
    model, stream = direction("loss=1%"), StreamModel()
    for _ in range(10_000):
        model.offer(stream, 14_480, now_ns=0)
    assert 800 < model.lost_packets < 1200


def test_a_lost_packet_stalls_only_its_own_connection_for_a_round_trip() -> None:
    model = direction("delay=40ms,loss=99.9%")
    model.rtt_ns = 80 * MS
    unlucky, lone = StreamModel(bytes_in_flight=100_000), StreamModel()
    assert model.offer(unlucky, 1448, now_ns=0) == 120 * MS
    assert model.offer(lone, 100, now_ns=0) == 320 * MS  # only the sender's timer notices
    model.change(parse_settings("delay=40ms,loss=0", PLAIN))
    assert model.offer(unlucky, 1448, now_ns=MS) == 120 * MS
    assert model.offer(StreamModel(), 1448, now_ns=MS) == 41 * MS


def test_a_loss_can_cut_the_rate_of_its_connection() -> None:
    model, stream = direction("rate=100mbit,loss=99.9%,cut=50%"), StreamModel()
    model.rtt_ns = 100 * MS
    model.offer(stream, 1448, now_ns=0)
    model.change(parse_settings("rate=100mbit,cut=50%", PLAIN))
    half_ns = SECOND // 2
    times = [model.offer(stream, 125_000, now_ns=half_ns) - half_ns for _ in range(10)]
    assert times[-1] == pytest.approx(190 * MS, rel=0.02)


def test_an_old_connection_backs_off_while_the_link_is_down() -> None:
    model, stream = direction("delay=50ms"), StreamModel(stalled_since_ns=0)
    model.rtt_ns = 100 * MS  # tries at 0.3, 0.9, 2.1, 4.5 s
    assert model.resume_ns(stream, now_ns=200 * MS) == 300 * MS
    assert model.resume_ns(stream, now_ns=1_000 * MS) == 2_100 * MS
    assert model.resume_ns(stream, now_ns=2_200 * MS) == 4_500 * MS
    assert model.resume_ns(StreamModel(), now_ns=5) == 5


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_the_next_try_is_never_in_the_past(since_ns: int, wait_ns: int) -> None:
    now_ns = since_ns + wait_ns
    try_ns = next_try_ns(since_ns, now_ns, 200 * MS)
    assert now_ns <= try_ns <= now_ns + max(200 * MS, min(2 * wait_ns, 120 * SECOND))
