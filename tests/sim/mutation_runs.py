"""Runs in which the product, broken in a known way, has to be found out.

To be quick, some are looked for in runs that lean towards what they need; none is told what to look
for. `python -m tests.sim --mutation NAME` looks for one in ordinary runs.
"""

from __future__ import annotations

from typing import Any

from geomirror.limits import KIB
from geomirror.wan_protocol.sync_policy import SyncPolicy
from tests.sim.growth_mutations import GROWTH_MUTATIONS
from tests.sim.mark_mutations import MARK_MUTATIONS
from tests.sim.mutations import MUTATIONS, mutated
from tests.sim.options import NEVER
from tests.sim.oracle import OracleError
from tests.sim.proof import StumbleError
from tests.sim.put_back_mutations import OLDER_PRIMARIES, PUT_BACK_MUTATIONS
from tests.sim.resync_mutations import RESYNC_MUTATIONS
from tests.sim.rewind_mutations import REWIND_MUTATIONS
from tests.sim.simulation import Simulation
from tests.sim.succession import successions
from tests.sim.succession_mutations import SUCCESSION_MUTATIONS
from tests.sim.sync_mutations import SYNC_MUTATIONS
from tests.sim.verify_mutations import VERIFY_MUTATIONS
from tests.sim.world import SECOND

SEEDS_MAX = 100
CRASHES: dict[str, Any] = {"promise_crash_chance": 0.1}
OVERFLOWS: dict[str, Any] = {
    "bytes_per_second": 60_000,
    "journal_bytes": 1024 * KIB,
    "burst": 20,
    "cut_mean_ns": 2 * SECOND,
}
RULES: dict[str, Any] = {
    "policy": SyncPolicy({"colo": "durable", "west": "durable"}, None, None),
    "policy_mean_ns": 2 * SECOND,
    "cut_mean_ns": SECOND,
    "crash_mean_ns": NEVER,
    "stop_mean_ns": NEVER,
    "bytes_per_second": 2_000_000,
    "first_sync": False,
}
GROWTHS: dict[str, Any] = {"growth_chance": 0.1}
VERIFIES: dict[str, Any] = {"verify_mean_ns": SECOND, "rot_mean_ns": SECOND}
FOCUS: dict[str, dict[str, Any]] = {
    "ship_before_fsync": CRASHES,
    "durable_before_fsync": CRASHES,
    "flush_before_sync": CRASHES,
    "lose_bitmap_bit": OVERFLOWS,
    "bits_cleared_early": OVERFLOWS,
    "saved_after_the_overwrite": OVERFLOWS,
    "before_images_not_synced": OVERFLOWS,
    "answered_from_memory": OVERFLOWS,
    "zeros_there_are_equal": OVERFLOWS,
    # Harm is done where all is acknowledged before the open epoch is sealed.
    "unsealed_copied": {
        **OVERFLOWS,
        "burst": 40,
        "bytes_per_second": 2_000_000,
        "cut_mean_ns": 4 * SECOND,
        "delay_ns": {"east": SECOND // 500, "colo": SECOND // 500, "west": SECOND // 500},
        "jitter_ns": 0,
    },
    "frames_not_asked_for": {
        "break_mean_ns": SECOND,
        "crash_mean_ns": NEVER,
        "stop_mean_ns": NEVER,
        "cut_mean_ns": NEVER,
        "disk_fault_mean_ns": NEVER,
        "snapshot_mean_ns": NEVER,
        "promise_crash_chance": 0.0,
    },
    "rules_given_up_untold": RULES,
    "sizes_not_applied": GROWTHS,
    "sizes_before_their_epoch": GROWTHS,
    "grown_bytes_not_zeroed": GROWTHS,
    "old_sizes_not_kept": GROWTHS,
    "name_after_epoch": {"promise_crash_chance": 0.1, "marks_mean_ns": SECOND * 3 // 10},
    "tables_not_looked_at": VERIFIES,
    "standing_acknowledged_early": {**RULES, "promise_crash_chance": 0.6},
    # Where nothing rots, every difference that is found is none.
    "newest_epoch_compared": {"verify_mean_ns": SECOND, "burst": 20},
    "healed_with_what_the_image_holds": {**VERIFIES, "burst": 20},
    "goes_on_behind_what_was_asked": {
        "verify_mean_ns": NEVER,
        "verify_every_ns": 2 * SECOND,
        "rot_mean_ns": SECOND // 2,
        "crash_mean_ns": SECOND,
    },
    "apply_while_held": {"hold_mean_ns": 2 * SECOND},
    "late_copy_wins": OVERFLOWS,
    "thinning_forgets_pins": {"marks_mean_ns": SECOND},
    "older_copy_not_noticed": {"snapshot_mean_ns": 2 * SECOND},
    "resync_not_counted": {"snapshot_mean_ns": 2 * SECOND, "resynced_heir_chance": 0.5},
}
FOUND_WITH = {
    "answered_from_memory": 4,
    "before_images_not_synced": 2,
    "bits_cleared_early": 6,
    "claim_not_durable": 4,
    "cut_durable_tail": 3,
    "degraded_before_saved": 2,
    "drop_last_write": 7,
    "durable_before_fsync": 3,
    "flush_before_sync": 12,
    "flush_without_peers": 2,
    "fold_swallows_mark": 5,
    "frames_not_asked_for": 12,
    "goes_on_behind_what_was_asked": 3,
    "healed_with_what_the_image_holds": 11,
    "image_not_synced": 3,
    "last_region_not_compared": 6,
    "late_copy_wins": 7,
    "merge_keeps_newest": 4,
    "name_after_epoch": 11,
    "newest_epoch_compared": 11,
    "older_copy_not_noticed": 5,
    "open_epoch_not_confirmed": 12,
    "orphan_tail_dropped": 4,
    "pass_swallows_mark": 3,
    "places_of_merged_files_mixed_up": 2,
    "resync_not_counted": 3,
    "return_not_gone_on_with": 4,
    "rules_given_up_untold": 11,
    "saved_after_the_overwrite": 2,
    "ship_before_fsync": 2,
    "stale_token_accepted": 43,
    "standing_acknowledged_early": 4,
    "status_of_what_was_received": 14,
    "status_without_the_bitmap": 2,
    "status_without_the_draft": 5,
    "superblock_not_synced": 2,
    "thinning_forgets_pins": 4,
    "undo_not_synced": 6,
    "undo_of_the_tail_stays": 5,
    "unsealed_copied": 9,
}
"""Seeds that find a mutation early in their run, tried first; others may when the code changes.

What is not here is found with seed 1, or with one of the next."""
IN_REWINDS = {make.__name__ for make in REWIND_MUTATIONS}
IN_PUT_BACKS = {make.__name__ for make in OLDER_PRIMARIES}
IN_SUCCESSIONS = {make.__name__ for make in SUCCESSION_MUTATIONS} | IN_REWINDS | IN_PUT_BACKS


def focus_of(name: str, seed: int) -> dict[str, Any]:
    """What the runs lean towards in which a mutation is looked for."""
    drawn = successions(seed) if name in IN_SUCCESSIONS else {}
    found = {**drawn, **FOCUS.get(name, {})}
    if name in IN_REWINDS:
        return {**found, "rewind_mean_ns": SECOND, "put_back_mean_ns": NEVER}
    return {**found, "put_back_mean_ns": 3 * SECOND} if name in IN_PUT_BACKS else found


OF_MEMBERS = sorted(
    make.__name__
    for make in (*SUCCESSION_MUTATIONS, *REWIND_MUTATIONS, *SYNC_MUTATIONS, *PUT_BACK_MUTATIONS)
)
"""What members say and hear of each other."""
OF_COPIES = sorted(
    make.__name__
    for make in (*RESYNC_MUTATIONS, *VERIFY_MUTATIONS, *GROWTH_MUTATIONS, *MARK_MUTATIONS)
)
"""How copies are made, compared, grown and marked."""
OF_STORAGE = sorted(set(MUTATIONS) - {*OF_MEMBERS, *OF_COPIES})
"""All others: every mutation is in one of the three, each of which is a file of tests."""


def find(name: str) -> None:
    """Look for a mutation.

    :raises AssertionError: none of the runs notices it.
    """
    first = FOUND_WITH.get(name, 1)
    for seed in [*range(first, SEEDS_MAX + 1), *range(1, first)]:
        with mutated(name):
            try:
                Simulation(seed, **focus_of(name, seed)).run()
            except OracleError as error:
                print(f"found with seed {seed}: {str(error).splitlines()[0]}")
                return
            except StumbleError as error:
                print(f"seed {seed} proves nothing: {str(error).splitlines()[0]}")
    raise AssertionError(f"{name} is not found within {SEEDS_MAX} seeds")
