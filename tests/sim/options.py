"""What may happen in one run, drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from geomirror.limits import KIB
from geomirror.wan_protocol.sync_policy import ASYNCHRONOUS, SyncPolicy
from tests.sim.world import MS, SECOND

NEVER = 1 << 62


@dataclass(frozen=True)
class Options:
    """Swarm: every run has its own mixture; each kind of fault is absent in many.

    Time goes by in storms (writes and faults close together) and calms between them (a write now
    and then, faults rare). Means of faults are of storm time.
    """

    seconds: int
    storm_ns: tuple[int, int]
    calm_ns: tuple[int, int]
    delay_ns: dict[str, int]
    jitter_ns: int
    bytes_per_second: int
    flip_chance: float
    burst: int
    journal_bytes: int
    first_sync: bool
    bit_flips: bool
    clock_rates: dict[str, float]
    crash_mean_ns: int
    stop_mean_ns: int
    cut_mean_ns: int
    break_mean_ns: int
    disk_fault_mean_ns: int
    slow_disk_mean_ns: int
    clock_step_mean_ns: int
    hold_mean_ns: int
    pause_mean_ns: int
    snapshot_mean_ns: int
    promise_crash_chance: float
    """That the power goes away right after something was said to be durable."""
    change_crash_chance: float = 0.0
    """That the power goes away in a step of a change of a role."""
    growth_chance: float = 0.0
    """That a volume grows or is added after a round of writes."""
    policy: SyncPolicy = ASYNCHRONOUS
    """What flushes wait for at first."""
    policy_mean_ns: int = NEVER
    """Between changes of it."""
    marks_mean_ns: int = NEVER
    """Between two operations on marks."""
    nodes: int = 3
    succession_mean_ns: int = NEVER
    """Between two changes of the primary that an operator asks for."""
    resynced_heir_chance: float = 0.0
    """That a primary is lost right after it has resynced a copy, whose readers hold it still."""
    put_back_mean_ns: int = NEVER
    """Between snapshots of the primary's disk that are put back later."""
    rewind_mean_ns: int = NEVER
    """Between two looks whether to rewind the primary, or to end a rewind."""
    verify_mean_ns: int = NEVER
    """Between looks whether to start a verify."""
    verify_every_ns: int = NEVER
    """Interval in which every copy is compared by itself."""
    rot_mean_ns: int = NEVER
    """Between blocks of secondaries that rot at rest."""

    @classmethod
    def draw(cls, chance: random.Random, seconds: int, names: list[str]) -> Options:
        """The options of a run of so many seconds between nodes of these names."""

        def mean(low_s: float, high_s: float, absent: float = 0.3) -> int:
            if chance.random() < absent:
                return NEVER
            return int(chance.uniform(low_s, high_s) * SECOND)

        delay_ms = chance.uniform(1, 150)
        return cls(
            seconds=seconds,
            storm_ns=(2 * SECOND, 9 * SECOND),
            calm_ns=(15 * SECOND, 240 * SECOND),
            delay_ns={name: int(delay_ms * chance.uniform(0.3, 1.7) * MS) for name in names},
            jitter_ns=int(chance.choice([0, 2, 40]) * MS),
            bytes_per_second=chance.choice([60_000, 300_000, 2_000_000]),
            flip_chance=chance.choice([0.0, 0.0, 0.01]),
            burst=chance.choice([2, 6, 20]),
            journal_bytes=chance.choice([1024, 2048, 4096]) * KIB,
            first_sync=chance.random() < 0.2,
            bit_flips=chance.random() < 0.15,
            clock_rates={name: chance.choice([1.0, 1.0, 0.9, 1.05]) for name in names},
            crash_mean_ns=mean(2, 10),
            stop_mean_ns=mean(5, 20),
            cut_mean_ns=mean(2, 10),
            break_mean_ns=mean(1, 10),
            disk_fault_mean_ns=mean(4, 15),
            slow_disk_mean_ns=mean(5, 20, 0.5),
            clock_step_mean_ns=mean(3, 15, 0.5),
            hold_mean_ns=mean(3, 10, 0.5),
            pause_mean_ns=mean(5, 20, 0.6),
            snapshot_mean_ns=mean(5, 20, 0.7),
            promise_crash_chance=chance.choice([0.0, 0.01, 0.03]),
            policy_mean_ns=mean(4, 20, 0.4),
        )
