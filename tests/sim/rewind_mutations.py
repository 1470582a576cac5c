"""Ways to break rewinds and their returns, each of which the simulator has to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from geomirror.node import branch_intake, rewinding
from tests.sim.sync_mutations import Patch


def returned_in_part() -> list[Patch]:
    """A return leaves the last piece of the branch out."""
    real = branch_intake._writes

    def writes(engine: Any, view: Any, bytes_max: int) -> Iterator[Any]:
        yield from list(real(engine, view, bytes_max))[:-1]

    return [(branch_intake, "_writes", writes)]


def return_not_gone_on_with() -> list[Patch]:
    """A return that a crash interrupted is left as it is."""
    return [(rewinding, "finish_return", lambda engine, node: None)]


REWIND_MUTATIONS: tuple[Callable[[], list[Patch]], ...] = (
    returned_in_part,
    return_not_gone_on_with,
)
