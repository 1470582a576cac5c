"""The file `tunnel/wireguard.json` of a node; taking away from the host what we have added."""

from __future__ import annotations

import asyncio
from pathlib import Path

from geomirror.environment import Entropy
from geomirror.errors import LinkError, NotFoundError
from geomirror.node.tunnel_host import TunnelHost
from geomirror.tunnel.addresses import ipv6_range
from geomirror.tunnel.hosts_file_io import update_hosts
from geomirror.tunnel.key_files_io import make_directory, read_file, write_file
from geomirror.tunnel.network_state_io import NetworkState
from geomirror.tunnel.wireguard_actual import only_ours
from geomirror.tunnel.wireguard_book import TunnelBook
from geomirror.tunnel.wireguard_desired import Desired, interface_tag
from geomirror.tunnel.wireguard_plan import Remove, Run, plan

PASSES_MAX = 3
"""What goes away by itself between look and deed is no failure of the next pass."""


class TunnelStore:
    """Loads and stores the book; on the event loop, files on a worker thread."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "tunnel" / "wireguard.json"
        self._lock = asyncio.Lock()
        self.book: TunnelBook | None = None

    def load(self) -> TunnelBook | None:
        """The book as it is on disk; None when there was never a tunnel.

        :raises IntegrityError: damaged. :raises ConfigError: others may read it.
        """
        if self.book is None:
            try:
                data = read_file(self._path)
            except NotFoundError:
                return None
            self.book = TunnelBook.from_json(data, str(self._path))
        return self.book

    async def load_or_create(self, entropy: Entropy) -> TunnelBook:
        """The same, with a new key where there was none."""
        book = self.load()
        if book is None:
            make_directory(self._path.parent)
            book = self.book = TunnelBook.create(entropy)
            await self.save()
        return book

    async def save(self) -> None:
        """Store the book durably."""
        assert self.book is not None
        async with self._lock:
            await asyncio.to_thread(write_file, self._path, self.book.to_json())


def hosts_owner(state: NetworkState) -> str:
    """Whose block in a hosts file is ours."""
    return f"{state.network}/{state.identity.node_id}"


def tag_of(state: NetworkState) -> str:
    """First part of our interfaces' names."""
    return interface_tag(state.authority_hash, state.identity.node_id)


def ranges_of(state: NetworkState) -> tuple[str, str]:
    """The network's, IPv4 and IPv6."""
    return state.range, str(ipv6_range(state.authority_hash))


async def take_away(state: NetworkState, host: TunnelHost, store: TunnelStore) -> list[str]:
    """Remove everything of this node's tunnels from the host, and nothing else.

    :returns: what was removed, in words.
    :raises GeomirrorError: something could not be removed; the rest may be repeated.
    """
    book = store.load()
    if book is None:
        return []
    nothing, removed = Desired(tag_of(state), book.private_key), []
    failures: dict[str, str] = {}
    for _ in range(PASSES_MAX):
        actual = only_ours(await host.look(), tag_of(state), ranges_of(state))
        steps = plan(nothing, actual, frozenset(book.addresses), 0)
        if not steps:
            break
        failures = await host.run(steps)
        removed += [_in_words(step) for step in steps if step.interface not in failures]
    else:
        raise LinkError(f"not all of the tunnels could be removed: {failures}")
    host.remove_sockets()
    if book.hosts_file:
        file, owner = Path(book.hosts_file), hosts_owner(state)
        is_changed = await asyncio.to_thread(update_hosts, file, owner, ())
        removed += [f"names in {file}"] if is_changed else []
    if book.addresses or book.hosts_file:
        book.addresses, book.hosts_file = [], ""
        await store.save()
    return removed


def _in_words(step: object) -> str:
    if isinstance(step, Remove):
        return f"interface {step.interface}"
    assert isinstance(step, Run)
    words = [word for word in step.arguments[1:] if word not in ("-4", "-6", "delete")]
    return " ".join(words)
