"""Golden vectors as text: rows of 16 bytes that are not zero, then the size."""

from __future__ import annotations

from pathlib import Path

VECTORS = Path(__file__).parent.parent / "vectors"


def dump(content: bytes) -> str:
    rows = [(at, content[at : at + 16]) for at in range(0, len(content), 16)]
    lines = [f"{at:08x} {row.hex()}" for at, row in rows if any(row)]
    return "\n".join([*lines, f"{len(content):08x}", ""])


def load(text: str) -> bytes:
    content = bytearray()
    for line in text.splitlines():
        at, _, row = line.partition(" ")
        content += bytes(int(at, 16) - len(content)) + bytes.fromhex(row)
    return bytes(content)
