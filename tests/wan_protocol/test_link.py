"""Stories of the link core, with a clock: when it dials, when it gives up, which set it uses."""

from __future__ import annotations

import itertools

from geomirror.environment import MS, SECOND, SeededEntropy
from geomirror.limits import PRODUCTION
from geomirror.wan_protocol.connection_set import RoundTrip
from geomirror.wan_protocol.frame_queue import FrameQueue
from geomirror.wan_protocol.link import Close, Decision, Dial, Down, LinkCore, SendPing, Up
from geomirror.wan_protocol.pacing import connection_rate, data_connections

X, Y, Z = b"x" * 16, b"y" * 16, b"z" * 16


class World:
    """A core whose timer is run at the right times, and a record of what it decided."""

    def __init__(
        self, node: str = "a", peer: str = "b", endpoints: tuple[str, ...] = ("b:1",)
    ) -> None:
        self.now_ns = 0
        self.log: list[tuple[int, Decision]] = []
        self.pings: list[tuple[bytes, int]] = []
        self.talking: dict[bytes, int] = {}
        """Sets whose other side answers pings, and after how long."""
        self.core = LinkCore(
            node=node,
            peer=peer,
            limits=PRODUCTION,
            entropy=SeededEntropy(node),
            endpoints=list(endpoints),
            now_ns=0,
        )
        self.core.handle_timer(0)
        self.drain()

    def drain(self) -> None:
        while (decision := self.core.next_decision()) is not None:
            if isinstance(decision, SendPing):
                if decision.link in self.talking:
                    due_ns = decision.now_ns + self.talking[decision.link]
                    self.pings.append((decision.link, due_ns))
            else:
                self.log.append((self.now_ns, decision))

    def run(self, until_ns: int) -> None:
        """Let time pass; sets in `talking` answer every ping."""
        while True:
            timer_ns = self.core.get_timer()
            echo = min(self.pings, key=lambda item: item[1], default=None)
            due_ns = min(
                until_ns,
                until_ns if timer_ns is None else timer_ns,
                until_ns if echo is None else echo[1],
            )
            self.now_ns = max(self.now_ns, due_ns)
            if echo is not None and echo[1] <= self.now_ns:
                self.pings.remove(echo)
                link, at_ns = echo
                if link in self.talking:
                    self.core.pong(link, at_ns - self.talking[link], self.now_ns)
            elif timer_ns is not None and timer_ns <= self.now_ns:
                self.core.handle_timer(self.now_ns)
            else:
                return
            self.drain()

    def dialled(self) -> list[tuple[int, Dial]]:
        """Attempts to make a control connection."""
        return [(at, d) for at, d in self.log if isinstance(d, Dial) and d.index < 0]

    def changes(self) -> list[Up | Down]:
        return [d for _, d in self.log if isinstance(d, Up | Down)]

    def closed(self) -> list[bytes]:
        return [d.link for _, d in self.log if isinstance(d, Close)]

    def come_up(self, link: bytes | None = None, round_trip_ns: int = 40 * MS) -> bytes:
        """A set is made: dialled by this node, or accepted under the name given."""
        is_dialled = link is None
        if link is None:
            link = self.dialled()[-1][1].link
        self.talking[link] = round_trip_ns
        self.core.control_up(link, self.now_ns, is_dialled=is_dialled)
        self.drain()
        self.core.data_up(link, 0, self.now_ns)
        self.drain()
        return link


def test_the_link_is_up_with_control_and_one_data_connection() -> None:
    world = World()
    ((_, dial),) = world.dialled()
    world.core.control_up(dial.link, 5 * MS, is_dialled=True)
    world.drain()
    data = [d for _, d in world.log if isinstance(d, Dial) and d.index >= 0]
    assert [d.index for d in data] == [0, 1, 2, 3]
    assert all(d.link == dial.link and d.endpoint == "b:1" for d in data)
    assert world.changes() == []
    world.core.data_up(dial.link, 2, 6 * MS)
    world.drain()
    assert world.changes() == [Up(dial.link)]


def test_a_peer_that_answers_stays_up_and_its_round_trip_is_known() -> None:
    world = World()
    link = world.come_up(round_trip_ns=80 * MS)
    world.run(60 * SECOND)
    assert world.changes() == [Up(link)]
    assert world.core.round_trip.smoothed_ns == 80 * MS
    assert len(world.dialled()) == 1


def test_attempts_come_every_second_then_slower_and_never_end() -> None:
    world = World()
    world.run(59 * SECOND)
    times = [at for at, _ in world.dialled()]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(800 * MS <= pause <= 1200 * MS for pause in pauses)
    assert len(set(pauses)) > 10  # jitter
    world.run(299 * SECOND)
    times = [at for at, _ in world.dialled() if at > 70 * SECOND]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(4 * SECOND <= pause <= 6 * SECOND for pause in pauses)
    world.run(3600 * SECOND)
    times = [at for at, _ in world.dialled() if at > 330 * SECOND]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(12 * SECOND <= pause <= 18 * SECOND for pause in pauses)
    assert times[-1] > 3570 * SECOND


def test_endpoints_are_tried_in_turn_and_few_attempts_hang_at_once() -> None:
    world = World(endpoints=("b:1", "b:2"))
    world.run(8 * SECOND)
    assert [d.endpoint for _, d in world.dialled()][:4] == ["b:1", "b:2", "b:1", "b:2"]
    assert len(world.dialled()) - len(world.closed()) <= 3


def test_a_node_without_endpoints_of_its_peer_only_waits() -> None:
    world = World(endpoints=())
    world.run(100 * SECOND)
    assert world.log == []
    link = world.come_up(X)
    assert world.changes() == [Up(link)]
    del world.talking[link]
    world.run(200 * SECOND)
    assert isinstance(world.changes()[-1], Down)
    assert world.dialled() == []


def test_silence_is_noticed_after_five_intervals_and_a_new_set_is_dialled_beside() -> None:
    world = World()
    old = world.come_up()
    world.run(10 * SECOND)
    del world.talking[old]
    world.log.clear()
    world.run(12 * SECOND)
    (at_ns, down), (dial_ns, dial) = world.log[:2]
    assert isinstance(down, Down)
    assert 600 * MS <= at_ns - 10 * SECOND <= 900 * MS
    assert isinstance(dial, Dial) and dial_ns == at_ns
    assert old not in world.closed()
    new = world.come_up()
    assert world.changes()[-1] == Up(new)
    assert old in world.closed()


def test_a_long_path_gets_more_patience() -> None:
    world = World()
    link = world.come_up(round_trip_ns=600 * MS)
    world.run(30 * SECOND)
    assert world.changes() == [Up(link)]
    del world.talking[link]
    world.log.clear()
    world.run(40 * SECOND)
    at_ns = next(at for at, d in world.log if isinstance(d, Down))
    assert 3 * 600 * MS - 600 * MS <= at_ns - 30 * SECOND <= 3 * SECOND


def test_a_short_silence_ends_with_the_old_set_if_it_speaks_first() -> None:
    world = World()
    link = world.come_up()
    world.run(5 * SECOND)
    del world.talking[link]
    world.run(7 * SECOND)
    assert isinstance(world.changes()[-1], Down)
    attempts = {d.link for _, d in world.dialled()} - {link}
    assert attempts
    world.talking[link] = 40 * MS
    world.run(8 * SECOND)
    assert world.changes()[-1] == Up(link)
    assert attempts <= set(world.closed())  # attempts under way are given up


def test_one_way_silence_is_noticed_though_the_peer_is_heard() -> None:
    world = World()
    link = world.come_up()
    world.run(5 * SECOND)
    del world.talking[link]  # our pings are lost, theirs arrive
    while world.now_ns < 8 * SECOND and len(world.changes()) == 1:
        world.run(world.now_ns + 100 * MS)
        world.core.heard(link, world.now_ns)
        world.drain()
    assert isinstance(world.changes()[-1], Down)
    assert world.now_ns - 5 * SECOND <= 2 * 750 * MS + 400 * MS
    assert len(world.dialled()) >= 2


def test_a_node_that_slept_itself_does_not_blame_its_peer() -> None:
    world = World()
    link = world.come_up()
    world.run(5 * SECOND)
    world.now_ns = 15 * SECOND  # the process was stopped for ten seconds
    world.core.handle_timer(world.now_ns)
    world.drain()
    assert world.changes() == [Up(link)]
    world.core.heard(link, world.now_ns)
    world.run(20 * SECOND)
    assert world.changes() == [Up(link)]
    del world.talking[link]
    world.run(22 * SECOND)
    assert isinstance(world.changes()[-1], Down)


def test_when_both_dial_both_sides_choose_the_set_of_the_smaller_name() -> None:
    for order in (0, 1):
        a, b = World("a", "b", ("b:1",)), World("b", "a", ("a:1",))
        by_a, by_b = a.dialled()[0][1].link, b.dialled()[0][1].link
        for world, other in ((a, by_b), (b, by_a)):
            mine = world.dialled()[0][1].link
            steps = [(mine, True), (other, False)]
            for link, is_dialled in steps if order == 0 else steps[::-1]:
                world.talking[link] = 10 * MS
                world.core.control_up(link, world.now_ns, is_dialled=is_dialled)
            for link, _ in steps if order == 0 else steps[::-1]:
                world.now_ns += 1 * MS
                world.core.data_up(link, 0, world.now_ns)
            world.drain()
            world.run(5 * SECOND)
            assert world.changes()[-1] == Up(by_a)
            assert world.closed() == [by_b]
            alternating = [type(change) for change in world.changes()]
            assert alternating in ([Up], [Up, Down, Up])


def test_a_set_that_is_not_young_is_replaced_by_a_newer_one() -> None:
    world = World("a", "b")
    old = world.come_up()
    world.run(60 * SECOND)
    new = world.come_up(X)
    assert world.changes() == [Up(old), Down("replaced"), Up(new)]
    assert old not in world.closed()  # the peer may not have chosen yet
    world.run(62 * SECOND)
    assert world.closed() == [old]


def test_a_set_that_lost_is_used_again_if_the_winner_dies() -> None:
    world = World("a", "b")
    old = world.come_up()
    world.run(60 * SECOND)
    new = world.come_up(X)
    world.core.set_lost(new, "reset", world.now_ns + 1)
    world.drain()
    assert world.changes()[-2:] == [Down("reset"), Up(old)]
    world.run(70 * SECOND)
    assert world.changes()[-1] == Up(old)


def test_a_lost_data_connection_is_dialled_again_and_is_no_event() -> None:
    world = World()
    link = world.come_up()
    world.core.data_up(link, 1, world.now_ns)
    world.run(20 * SECOND)
    world.log.clear()
    world.core.data_lost(link, 1, "reset", world.now_ns)
    world.drain()
    world.run(21 * SECOND)
    assert [type(d) for _, d in world.log] == [Dial]
    at_ns, dial = world.log[0]
    assert dial == Dial(link, "b:1", 1)
    assert at_ns - 20 * SECOND <= 150 * MS
    world.core.dial_failed(link, 1, "refused", world.now_ns)
    world.run(23 * SECOND)
    assert [d for _, d in world.log] == [dial, dial]


def test_without_any_data_connection_the_link_is_down_and_then_closed() -> None:
    world = World()
    link = world.come_up()
    world.run(2 * SECOND)
    world.core.data_lost(link, 0, "reset", world.now_ns)
    world.drain()
    assert world.changes()[-1] == Down("reset")
    world.run(13 * SECOND)
    assert link in world.closed()
    assert world.dialled()[-1][1].link != link


def test_a_flapping_link_is_never_dialled_faster_than_each_second() -> None:
    world = World()
    for _ in range(20):
        link = world.come_up()
        world.run(world.now_ns + 100 * MS)
        world.core.set_lost(link, "reset", world.now_ns)
        world.drain()
        count = len(world.dialled())
        while len(world.dialled()) == count:
            world.run(world.now_ns + 50 * MS)
    times = [at for at, _ in world.dialled()]
    assert all(later - earlier >= 800 * MS for earlier, later in itertools.pairwise(times))


def test_a_peer_cannot_open_sets_without_end() -> None:
    world = World(endpoints=())
    for number in range(20):
        world.core.control_up(bytes([number]) * 16, number, is_dialled=False)
    world.drain()
    assert len(world.closed()) == 12


def test_closing_closes_everything_and_leaves_no_timer() -> None:
    world = World()
    link = world.come_up()
    world.core.close("stop")
    world.drain()
    assert world.changes() == [Up(link), Down("stop")]
    assert link in world.closed()
    assert world.core.get_timer() is None


def test_round_trip_follows_the_rules_of_rfc_6298() -> None:
    trip = RoundTrip()
    assert trip.patience_ns(PRODUCTION) == 750 * MS
    trip.add(100 * MS)
    assert (trip.smoothed_ns, trip.variation_ns) == (100 * MS, 50 * MS)
    trip.add(180 * MS)
    assert (trip.smoothed_ns, trip.variation_ns) == (110 * MS, 57_500_000)
    assert trip.patience_ns(PRODUCTION) == 750 * MS
    assert trip.interval_ns(PRODUCTION) == 150 * MS


def test_data_connections_follow_the_bandwidth_delay_product() -> None:
    assert data_connections(PRODUCTION, None, 100 * MS) == 4
    assert data_connections(PRODUCTION, 12_500_000, 40 * MS) == 2
    assert data_connections(PRODUCTION, 125_000_000, 100 * MS) == 5
    assert data_connections(PRODUCTION, 1_250_000_000, 200 * MS) == 8
    assert connection_rate(12_500_000, 4) == 2_937_500


def test_frames_are_taken_by_turns_and_resync_waits_for_live() -> None:
    queue = FrameQueue()
    full, small = b"f" * 65_536, b"s" * 1000
    for _ in range(3):
        queue.push(9, b"R", full, is_resync=True)
        queue.push(1, b"A", full, is_resync=False)
    for _ in range(100):
        queue.push(2, b"B", small, is_resync=False)
    order = "".join(part.decode() for part in iter_headers(queue))
    # A full frame of session 1, then as many bytes of session 2, and so on; resync last.
    assert order.startswith("A" + "B" * 66 + "A" + "B" * 34 + "A")
    assert order.endswith("RRR")
    assert queue.queued_bytes == 0
    queue.push(1, b"A", full, is_resync=False)
    queue.clear()
    assert queue.pop(1000) == []


def iter_headers(queue: FrameQueue) -> list[bytes]:
    headers = []
    while queue.queued_bytes:
        headers += queue.pop(1)[::2]
    return headers
