"""A disk in RAM with metadata contexts of its own, answered at once or when told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from geomirror.errors import GeomirrorError
from geomirror.nbd.contexts import Answer
from geomirror.nbd.structured import encode_extents, fit_extents
from tests.nbd.ram_export import RamExport


@dataclass
class ContextExport(RamExport):
    """`states` are (length, flags) of each context, from offset 0."""

    states: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    is_slow: bool = False
    waiting: list[Callable[[], None]] = field(default_factory=list)
    asked: list[tuple[list[str], int, int, int]] = field(default_factory=list)
    status_error: GeomirrorError | None = None

    def context_names(self) -> list[str]:
        return list(self.states)

    def describe(
        self, names: Sequence[str], offset: int, length: int, extents_max: int, answer: Answer
    ) -> None:
        self.asked.append((list(names), offset, length, extents_max))

        def reply() -> None:
            if self.status_error is not None:
                answer([], self.status_error)
                return
            found = [self._extents(name, offset, length, extents_max) for name in names]
            answer(found, None)

        if self.is_slow:
            self.waiting.append(reply)
        else:
            reply()

    def _extents(self, name: str, offset: int, length: int, extents_max: int) -> bytes:
        cut: list[tuple[int, int]] = []
        at = 0
        for size, flags in self.states[name]:
            low, at = max(at, offset), at + size
            cut.append((at - low, flags))
        return encode_extents(fit_extents(cut, length, extents_max))
