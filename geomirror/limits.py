"""Every bound, with its unit and the relations between bounds asserted.

Cores receive a `Limits` value; the simulator passes `SIMULATION`, whose small segments and epochs
make rings wrap and backlogs overflow within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from geomirror.environment import MS, SECOND

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

BLOCK_BYTES = 4 * KIB
"""The canonical block: the unit of epochs, digests and undo. Not a limit: part of the formats."""
SECTOR_BYTES = 512
"""Volume sizes are multiples of this; the last block of a volume may be short."""
FRAME_RAW_BYTES_MAX = 64 * KIB
"""Raw data in one data frame. zstd level 1 silently loses prefix matches above 64 KiB."""
REGION_BYTES = 64 * KIB
"""One bit of a dirty bitmap: 2 MiB of RAM per TiB."""


@dataclass(frozen=True)
class Limits:
    """The bounds of one node. Names end in their unit and in `_max` or `_min`."""

    segment_bytes: int = 64 * MIB
    """Journal segment. Preallocated by writing zeros; the unit of recycling."""
    record_payload_bytes_max: int = 4 * MIB
    """Payload of one journal record; longer writes are split inside their batch."""
    journal_bytes_min: int = 256 * MIB
    """Smallest journal: four segments."""
    spare_segments_max: int = 2
    """Zeroed segments kept ready, so that no write waits for preallocation."""

    dirty_bytes_max: int = 1 * GIB
    """Undestaged data; beyond it writers wait for the local disk, never for a link."""
    dirty_entries_max: int = 262_144
    """Undestaged index entries (about 100 bytes of RAM each)."""
    apply_pass_bytes_max: int = 256 * MIB
    """Data of one apply pass, but at least one epoch: the step in which room comes back."""
    apply_read_bytes_max: int = 16 * MIB
    """New contents in memory at once during a pass: few reads of the journal, and enough blocks
    that adjacent ones still meet in one write."""
    destage_fraction: float = 0.75
    """Part of those two bounds at which destaging starts: below it a burst has the CPU and the disk
    for itself, above it there is still room while the first pass runs."""
    destage_age_ns_max: int = 30 * SECOND
    """Oldest undestaged epoch before a destage pass starts."""
    destage_idle_ns: int = 1 * SECOND
    """Nobody has written for so long: time to destage, so that the next burst has all the room."""
    destage_idle_bytes_min: int = 64 * MIB
    """But not for less than this: every pass costs some syncs and one of the undo's files."""
    zero_run_blocks_min: int = 64
    """A zero or trim run of at least this many blocks is one extent instead of single entries."""

    epoch_age_ns: int = 250 * MS
    """Age at which an open epoch is sealed."""
    epoch_bytes_max: int = 16 * MIB
    """Size at which an open epoch is sealed early."""
    epoch_entries_max: int = 1 << 20
    """Entries in one epoch table (40 bytes each); bounds memory against a hostile peer."""
    fold_bytes_max: int = 32 * MIB
    """Raw bytes of one fold: its frames are held in RAM until the peer has them durable."""
    fold_epochs_max: int = 1024
    """Epochs of one fold; bounds the time of one merge."""
    resync_read_bytes_max: int = 4 * MIB
    """Data read by one step of a resync."""
    resync_run_bytes_max: int = 1 * GIB
    """Range looked at by one step of a resync; holes in it cost nothing."""
    resync_held_bytes_max: int = 32 * MIB
    """Frames of a resync kept until they are durable in the peer's image, but for those of one more
    step: as much as a fold. 8 MiB are 0.7 s of 100 Mbit/s: while a peer syncs for a second, the
    link would stand idle for most of that; 32 MiB are 2.7 s."""
    resync_node_regions: int = 256
    """Regions of a node: what is equal in it costs one digest (16 MiB)."""
    fold_backlog_fraction: float = 0.25
    """Backlog, as a part of the journal, at which a peer's unsent epochs are folded."""
    bitmap_backlog_fraction: float = 0.90
    """Backlog, as a part of the journal, at which a peer goes to its dirty bitmap."""
    mode_dwell_ns_min: int = 30 * SECOND
    """Shortest stay in FOLD, BITMAP or RESYNC: a jittery link must not flip modes for ever."""

    undo_bytes_max: int = 4 * GIB
    """Undo kept per resource; the oldest passes are dropped first. One pass may take all of it;
    one that would take more leaves a labelled gap."""
    resync_undo_bytes_max: int = 1 << 40
    """Before-images of one resync, as stored: without them the copy would be inconsistent until
    its end, so that the disk, not the budget of history, is the bound unless told otherwise."""
    undo_free_bytes_min: int = 1 * GIB
    """What the before-images of a large pass leave free of the disk, for journal and images."""
    undo_passes_max: int = 16_384
    """Undo files kept per resource: bounds the start, which reads the header of each, and memory
    (1 KiB each). Asserted: what the default levels keep fits without pressure."""
    undo_pressure_fraction: float = 0.8
    """Part of those two bounds from which on fine history is merged before its time."""
    undo_inspected_max: int = 256
    """Newest undo files whose tables are read at a start, too; those of the others are read by the
    jobs that thin history, `undo_merge.TABLES_PER_JOB` each."""
    timeline_points_max: int = 500
    """Points in one answer of `timeline`: at 250 bytes each, an eighth of a message."""
    undo_levels: tuple[tuple[int, int], ...] = (
        (1 * SECOND, 3_600 * SECOND),
        (30 * SECOND, 24 * 3_600 * SECOND),
        (300 * SECOND, 7 * 24 * 3_600 * SECOND),
        (3_600 * SECOND, 30 * 24 * 3_600 * SECOND),
    )
    """(step, age): one point in each step is kept up to the age; the first steps are Litestream's
    sizes. Asserted: both grow."""
    undo_settled_ns: int = 10 * SECOND
    """Newer passes are not merged: a crash may have to repeat one of them exactly as it was."""
    undo_merge_bytes_max: int = 64 * MIB
    """Before-images of one merge of passes, for which applying waits."""
    undo_scrub_ns: int = 24 * 3_600 * SECOND
    """All undo is read through once in this time, so that damage is known before it is needed."""
    undo_scrub_bytes: int = 32 * MIB
    """At a time, every ten seconds at most; applying waits for it."""
    view_entries_max: int = 1 << 20
    """Blocks changed since a view's epoch that its index holds (20 bytes each; half a KiB for each
    pass comes on top)."""
    views_max: int = 4
    """Views of one resource on a node."""

    branches_bytes_max: int = 64 * GIB
    """Stored branches of one resource; a rollback whose tail does not fit is refused."""
    branches_max: int = 64
    """Branches of one resource: each is a file that its owner looks at one day."""
    rollback_entries_max: int = 1 << 22
    """Blocks changed since the epoch of a rollback (60 bytes of memory each)."""
    way_back_fraction: float = 0.25
    """Part of the journal that is kept beyond what peers need, so that a rollback can end within
    an apply pass. Asserted: at most the backlog at which folding begins."""
    way_back_bytes_max: int = 1 * GIB
    """But not more than this, and `way_back_epochs_max` epochs: their tables are read at the
    start."""
    way_back_epochs_max: int = 4096

    verify_region_blocks: int = 256
    """Blocks of a verify that share one digest on the wire: 16 bytes for a MiB."""
    verify_read_bytes_max: int = 4 * MIB
    """Data read by one step of a verify."""
    verify_round_bytes_max: int = 64 * MIB
    """Data compared at one epoch, of which both sides keep what they need: for 3 s at the
    default rate of a verify."""
    verify_runs_kept: int = 1000
    """Runs of different blocks that a verify names; further ones are counted."""
    sealed_entries_max: int = 1 << 20
    """Blocks that wait to be applied when a sealed epoch is read (48 bytes of memory each)."""

    drills_kept: int = 100
    """Results of drills of one resource on a node: three months of daily ones."""

    marks_max: int = 1024
    """Marks of a resource. All of them travel in one message (120 bytes each) after each change; an
    hourly one is kept for six weeks."""

    window_bytes_min: int = 16 * MIB
    """Smallest window of bytes sent and not yet received by a peer."""
    credit_bytes: int = 64 * MIB
    """Receiver's pool of spooled frames of incomplete epochs, node-wide."""
    acknowledge_delay_ns: int = 20 * MS
    """Longest wait before an acknowledgement is sent."""
    acknowledge_bytes: int = 1 * MIB
    """Bytes received after which an acknowledgement is sent at once."""
    message_bytes_max: int = 1 * MIB
    """One control message."""
    queue_bytes_max: int = 4 * MIB
    """Frames waiting in one connection's own queue."""

    hello_interval_ns: int = 150 * MS
    """Heartbeat on the control connection; adaptive to the RTT."""
    hello_misses_max: int = 5
    """Silent intervals before a path counts as dead. With 3, a path that loses 2 % each way, and so
    4 % of pings with their answers, would count as dead every 40 min: 150 ms / 0.04³."""
    reconnect_interval_ns: int = 250 * MS
    """Between attempts to connect in the first minute of an outage, with 20 % jitter."""
    reconnect_interval_ns_max: int = 15 * SECOND
    """Between attempts after an hour of failures."""
    data_connections: int = 4
    """Data connections of a node pair."""
    data_connections_max: int = 8
    """Upper bound when rate x RTT asks for more than one send buffer each."""

    nbd_payload_bytes_max: int = 32 * MIB
    """Payload of one NBD request."""
    nbd_connections_max: int = 64
    """Connections of one export."""
    nbd_requests_max: int = 4096
    """Requests in flight of one connection; clients use 16 to 256. Beyond it reading pauses."""
    nbd_queued_bytes_max: int = 64 * MIB
    """Writes that wait for journal room, and replies that wait for a client, per connection."""
    full_disk_wait_ns_max: int = 30 * SECOND
    """How long a full disk holds writers back before they get ENOSPC."""
    reader_pin_ns_max: int = 60 * SECOND
    """How long a reader of a secondary may hold back applying before it gets EIO."""

    attach_retry_ns: int = 100 * MS
    """Between attempts of an attachment to reach its daemon again: what they wait for who read and
    write, beyond its start."""
    attach_retry_ns_max: int = 1 * SECOND
    """The same after some failures."""
    attach_scratch_bytes_max: int = 1 * GIB
    """What mounting a copy may write beside it: the largest journal that mkfs.ext4 makes."""

    tcp_segment_bytes: int = 1220
    """TCP segments of links, without IP and TCP header: 1280 bytes with IPv6, which every path
    carries. 0: as the kernel finds."""
    handshake_ns_max: int = 5 * SECOND
    """TLS handshake of an accepted connection; a stranger cannot hold a socket longer."""
    handshakes_max: int = 128
    """Accepted connections not yet authenticated; one more ends the oldest of them."""
    dial_ns_max: int = 10 * SECOND
    """Reaching and authenticating a peer, all of its addresses together."""
    join_line_bytes_max: int = 64 * KIB
    """One line of the join exchange; a welcome carries every member of the network."""
    join_exchange_ns_max: int = 10 * SECOND
    """A whole join exchange."""
    join_connections_max: int = 8
    """Join exchanges at a time."""
    join_failures_max: int = 10
    """Refused tokens per source address within a minute; then its further attempts are refused."""
    token_text_bytes_max: int = 2 * KIB
    """A printed join token."""
    token_records_max: int = 1024
    """Tokens kept at the authority, used ones included, for the audit."""
    endpoints_max: int = 8
    """Endpoints of one node."""
    tunnel_ports_max: int = 256
    """UDP ports from `[tunnel] port` on: one for each neighbour, also of those that left."""

    services_max: int = 256
    """Services that a node exposes, and ports that it forwards: as many of each."""
    circuits_max: int = 512
    """Forwarded TCP connections of a node. Each holds two sockets, `circuit_buffer_bytes` in each
    direction, and the buffers of kernel and TLS."""
    circuits_peer_max: int = 256
    """The same with one peer, so that one does not shut out the others."""
    circuits_opening_max: int = 16
    """Circuits asked for at once at one peer: calls of other kinds must get through."""
    circuits_ungreeted_max: int = 32
    """Accepted connections of one peer that have not said which circuit they are for."""
    circuit_buffer_bytes: int = 128 * KIB
    """Bytes of a circuit that wait for a socket to take them, in each direction, before the other
    side is not read any more; the kernel's buffers come on top."""
    circuit_open_ns_max: int = 10 * SECOND
    """Opening a circuit: the question, the service's answer to the connection, the handshake."""
    circuit_connect_ns_max: int = 4 * SECOND
    """Of that, connecting to the service. Asserted: it leaves time to say so."""
    circuit_orphan_ns_max: int = 5 * SECOND
    """How long circuits outlive their link. A path counts as dead after 0.75 s and is dialled again
    0.25 s later, and TCP repairs shorter outages by itself."""

    peers_max: int = 64
    """Nodes in a network."""
    resources_max: int = 256
    """Resources on a node."""
    volumes_max: int = 64
    """Volumes in a resource."""
    volume_bytes_max: int = 64 * TIB
    """Size of a volume."""

    def __post_init__(self) -> None:
        assert self.segment_bytes % (4 * KIB) == 0
        assert self.record_payload_bytes_max * 2 <= self.segment_bytes
        assert self.record_payload_bytes_max % BLOCK_BYTES == 0
        assert self.apply_read_bytes_max >= 2 * BLOCK_BYTES
        # Three segments: one being written, one pinned by a reader, one to go on with.
        assert self.journal_bytes_min >= 4 * self.segment_bytes
        # Two epochs per peer may be in flight while a third is open; none may fill the journal.
        assert self.epoch_bytes_max * 3 <= self.journal_bytes_min
        assert 1 < self.resync_node_regions <= 4096
        assert self.fold_backlog_fraction < self.bitmap_backlog_fraction < 1.0
        assert self.way_back_fraction <= self.fold_backlog_fraction
        assert self.queue_bytes_max >= FRAME_RAW_BYTES_MAX
        # An EPOCH record (40 bytes an entry) must fit in one segment.
        assert self.epoch_entries_max * 40 + 16 * KIB <= self.segment_bytes
        # Name, generation, three numbers and their framing.
        assert self.marks_max * 160 <= self.message_bytes_max // 2
        assert self.verify_region_blocks * BLOCK_BYTES <= self.verify_read_bytes_max
        assert self.undo_levels == tuple(sorted(self.undo_levels))
        # A point is 250 bytes; marks, which all may be in one answer, twice 160 each.
        points_bytes = self.timeline_points_max * 250 + self.marks_max * 320
        assert points_bytes <= self.message_bytes_max // 2
        assert self.window_bytes_min >= FRAME_RAW_BYTES_MAX
        assert self.hello_misses_max >= 3
        assert self.data_connections <= self.data_connections_max
        assert self.circuit_connect_ns_max * 2 <= self.circuit_open_ns_max
        assert self.circuits_opening_max < self.circuits_ungreeted_max <= self.circuits_peer_max
        # The largest member entry is under 1 KiB: endpoints_max names of at most 64 bytes.
        assert self.peers_max * KIB <= self.join_line_bytes_max
        assert self.peers_max <= self.tunnel_ports_max

    def way_back_bytes(self, journal_bytes: int) -> int:
        """Bytes of a journal of this size that are kept for rollbacks, at most."""
        return min(int(journal_bytes * self.way_back_fraction), self.way_back_bytes_max)

    @property
    def undo_points(self) -> int:
        """Passes that are kept when there is one in each step of each level, and no more: those
        that wait to be merged, and those that a mark or the size of a merge keeps apart."""
        count, start_ns, finer_ns = 0, 0, self.epoch_age_ns
        for step_ns, age_ns in self.undo_levels:
            waiting = -(-step_ns // finer_ns)
            count += (age_ns - start_ns) // step_ns + waiting
            start_ns, finer_ns = age_ns, step_ns
        settled = self.undo_settled_ns // self.epoch_age_ns
        # Two adjacent ones that are not merged hold more than one merge may; contents compress,
        # seldom by more than four.
        large = 2 * 4 * self.undo_bytes_max // self.undo_merge_bytes_max
        return count + settled + large + self.marks_max + self.views_max + self.branches_max


PRODUCTION = Limits()
assert PRODUCTION.undo_points <= PRODUCTION.undo_pressure_fraction * PRODUCTION.undo_passes_max

SIMULATION = Limits(
    segment_bytes=256 * KIB,
    record_payload_bytes_max=64 * KIB,
    journal_bytes_min=1 * MIB,
    dirty_bytes_max=256 * KIB,
    dirty_entries_max=512,
    apply_pass_bytes_max=128 * KIB,
    apply_read_bytes_max=24 * KIB,
    destage_age_ns_max=3 * SECOND,
    destage_idle_ns=200 * MS,
    destage_idle_bytes_min=128 * KIB,
    zero_run_blocks_min=4,
    epoch_bytes_max=64 * KIB,
    epoch_entries_max=4096,
    fold_bytes_max=256 * KIB,
    fold_epochs_max=16,
    resync_read_bytes_max=64 * KIB,
    resync_run_bytes_max=512 * KIB,
    resync_held_bytes_max=192 * KIB,
    resync_node_regions=4,
    mode_dwell_ns_min=2 * SECOND,
    undo_bytes_max=4 * MIB,
    undo_inspected_max=8,
    timeline_points_max=16,
    resync_undo_bytes_max=16 * MIB,
    undo_free_bytes_min=16 * KIB,
    marks_max=12,
    undo_levels=(
        (5 * SECOND, 60 * SECOND),
        (20 * SECOND, 300 * SECOND),
        (60 * SECOND, 540 * SECOND),
    ),
    undo_merge_bytes_max=512 * KIB,
    undo_scrub_ns=60 * SECOND,
    undo_scrub_bytes=256 * KIB,
    view_entries_max=4096,
    verify_region_blocks=8,
    verify_read_bytes_max=64 * KIB,
    verify_round_bytes_max=256 * KIB,
    verify_runs_kept=4,
    window_bytes_min=128 * KIB,
    credit_bytes=512 * KIB,
    acknowledge_bytes=64 * KIB,
    volume_bytes_max=64 * MIB,
)
