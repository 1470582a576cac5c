"""The lines for this network's nodes in a hosts file: between two marks, and nothing else.

    # BEGIN geomirror acme/0f3c…
    10.77.3.4 west-1.acme.internal
    fd12:3456:789a:… west-1.acme.internal
    # END geomirror acme/0f3c…

The marks carry network and node id, so that several nodes of one machine share a file. All other
lines stay as they are, byte for byte. A begin without its end is an edit: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

from geomirror.errors import RefusedError


def with_block(text: bytes, owner: str, lines: Sequence[str]) -> bytes:
    """The file's content with exactly these lines in the owner's block; without any, no block.

    An old block is replaced where it is, a new one comes to the end.

    :param owner: `NETWORK/NODE-ID`.
    :raises RefusedError: the marks are not one begin and one end, in this order.
    """
    begin, end = f"# BEGIN geomirror {owner}".encode(), f"# END geomirror {owner}".encode()
    found = text.splitlines(keepends=True)
    begins = [i for i, line in enumerate(found) if line.strip() == begin]
    ends = [i for i, line in enumerate(found) if line.strip() == end]
    block = [begin, *(line.encode() for line in lines), end] if lines else []
    new = [line + b"\n" for line in block]
    if not begins and not ends:
        if new and found and not found[-1].endswith(b"\n"):
            found[-1] += b"\n"
        return b"".join(found + new)
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise RefusedError(
            f'the marks "{begin.decode()}" and "# END …" in the hosts file are not a pair',
            hint="remove these lines and all between them by hand",
        )
    return b"".join([*found[: begins[0]], *new, *found[ends[0] + 1 :]])
