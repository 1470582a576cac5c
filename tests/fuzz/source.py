"""An input taken apart into choices; behind its end there are only zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads choices from the front of some bytes. Any bytes are a legal story."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_empty(self) -> bool:
        """Nothing but zeros follows."""
        return self._at >= len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes, exactly `count`."""
        found = self._data[self._at : self._at + count]
        self._at += count
        return found.ljust(count, b"\0")

    def number(self, size: int = 1) -> int:
        """A little-endian number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def below(self, bound: int) -> int:
        """A number in [0, bound)."""
        return self.number(1 if bound <= 1 << 8 else 2 if bound <= 1 << 16 else 4) % bound

    def flag(self) -> bool:
        """True or false."""
        return bool(self.number() & 1)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def rest(self) -> bytes:
        """All that is left."""
        found = self._data[self._at :]
        self._at = len(self._data)
        return found


def chunks(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """`data` cut into pieces of these sizes, taken in turn; the whole if there are none."""
    if not sizes:
        return [data]
    found, at, turn = [], 0, 0
    while at < len(data):
        size = max(1, sizes[turn % len(sizes)])
        found.append(data[at : at + size])
        at, turn = at + size, turn + 1
    return found


def require_equal(what: str, one: object, other: object) -> None:
    """Fail, showing where the texts of the two values part, when they differ."""
    if one == other:
        return
    texts = repr(one), repr(other)
    pairs = enumerate(zip(*texts, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(map(len, texts)))
    shown = [text[max(0, at - 100) : at + 200] for text in texts]
    raise AssertionError(f"{what}, from character {at}:\n  {shown[0]}\n  {shown[1]}")
