/*
 * A packet-level network between namespaces: what a WAN does to packets, without sch_netem.
 *
 *     namespace 0                                     namespace 1
 *    +----------+  TSO  +----------------------+  GRO  +----------+
 *    | device 0 |======>| loss, queue, rate,   |======>| device 1 |   up to 16 ports, a full mesh
 *    |          |<======| delay, reorder, copy |<======|          |   of directed links
 *    +----------+       +----------------------+       +----------+
 *
 * One process, one thread; needs /dev/net/tun and CAP_NET_ADMIN in the namespaces, which exist
 * already. `packet_emulator_io.py` starts it and is the only one that talks to it.
 *
 * What happens to each packet of at most the devices' MTU, in this order:
 *   1. link state: down drops it; stall keeps it and lets it go when the link is up again
 *   2. size: over the link's `mtu` it vanishes without a word (a hole in path MTU discovery)
 *   3. loss: alone (`loss`), or in bursts (Gilbert's two states: `burst_enter`, `burst_leave`)
 *   4. bottleneck: `queue` bytes, drop-tail, drained at `rate`
 *   5. `delay` ± `jitter`, in order; but a part of the packets (`reorder`) is `reorder_by` late
 *   6. `corrupt`: one flipped bit of the payload that no checksum of the kernel reveals;
 *      `duplicate`: it arrives twice
 *
 * The kernel hands over large TCP segments (TSO). They are cut into packets only logically, so that
 * each has its own fate, and neighbours that leave together are handed over as one again (GRO).
 * That is what network cards do, and it carries several Gbit/s with a part of one core.
 *
 * Each link has its own random stream, and every packet takes the same number of draws from it: the
 * fate of the n-th packet of a link depends on the seed alone, not on time or settings.
 *
 * Everything is bounded: ports, clients, lines, packets and bytes under way. What is over a bound
 * is dropped and counted (`overflow`).
 *
 * Control: lines on a Unix socket, one JSON line back for each.
 *   set FROM TO KEY=NUMBER...   down FROM TO   up FROM TO   stall FROM TO
 *   flap FROM TO NANOSECONDS    down now, and up again by itself
 *   stats
 * FROM and TO are port numbers from 0; times are nanoseconds, rates bits a second, sizes bytes,
 * chances between 0 and 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    PORTS_MAX = 16,
    CLIENTS_MAX = 8,
    LINE_BYTES_MAX = 1024, /* one command */
    WORDS_MAX = 24,        /* of one command */
    ANSWER_BYTES_MAX = 1 << 18,
    READ_BATCH = 256,         /* packets taken from one port before the others are looked at */
    PACKETS_MAX = 1 << 20,    /* under way or held, all links together */
    PACKET_BYTES_MAX = 70000, /* a whole TSO segment with its headers */
    HEADER_BYTES_MAX = 120,   /* IPv4 and TCP, both with all options */
    DEVICE_QUEUE = 20000,     /* packets; the bottleneck's queue is the link's, not the device's */
    TCP = 6,
    FIN_PSH = 0x09,
    CWR = 0x80,
};
#define BYTES_HELD_MAX (UINT64_C(512) << 20)
#define SECOND UINT64_C(1000000000)
#define NUMBER_MAX UINT64_C(1000000000000000) /* settings; doubles hold it exactly */

/* ------------------------------------------------------------------------------------ helpers */

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("packet_emulator: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static uint64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

/* xoshiro256**, seeded by splitmix64 */
struct chance {
    uint64_t state[4];
};

static uint64_t splitmix(uint64_t *seed) {
    uint64_t z = (*seed += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static uint64_t rotate(uint64_t value, int bits) {
    return (value << bits) | (value >> (64 - bits));
}

/* uniform in [0, 1) */
static double draw(struct chance *chance) {
    uint64_t *s = chance->state, value = rotate(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 45);
    return (double)(value >> 11) * 0x1.0p-53;
}

/* -------------------------------------------------------------------------------------- state */

struct settings {
    uint64_t rate, queue, delay, jitter, reorder_by, mtu; /* rate 0: unlimited; mtu 0: any size */
    double loss, burst_enter, burst_leave, reorder, duplicate, corrupt;
};

struct counters {
    uint64_t packets_in, bytes_in, packets_out, bytes_out, lost, oversized, queue_drops, down_drops;
    uint64_t duplicated, reordered, corrupted, queue_bytes_peak;
};

struct link {
    struct settings settings;
    bool is_down, is_stalled, is_bursting;
    uint64_t up_at;    /* when a flap ends; 0: no flap */
    double free_at;    /* ns: when the bottleneck has sent all that is queued */
    double old_until;  /* ns: until then it sends what was queued at another rate, */
    double old_rate;   /* this one on the average, bits a second */
    uint64_t last_due; /* keeps the order under jitter */
    uint64_t epoch;    /* moves with every `down`; packets of an older one are dropped */
    struct chance chance;
    struct counters count;
};

struct port {
    char netns[256];
    int descriptor;
    struct in_addr ipv4;
    struct in6_addr ipv6;
    int ipv4_prefix, ipv6_prefix;
};

/* What one read of a device gave; packets are slices of it. */
struct buffer {
    uint32_t references, length;
    uint16_t header_length, ip_length, segment; /* of a TSO segment: both headers, IP, gso_size */
    bool is_ipv6, is_tso;
    struct virtio_net_hdr offload;
    uint8_t data[];
};

struct packet {
    uint64_t due, order, epoch;
    struct buffer *buffer;
    uint32_t offset, length; /* slice of a TSO segment's payload */
    uint8_t from, to;
};

static struct port ports[PORTS_MAX];
static int port_count;
static struct link links[PORTS_MAX][PORTS_MAX];
static uint64_t unroutable, overflow, bytes_held;
static int device_mtu = 1500;
static bool is_offloading = true;
static uint64_t tick = 100000;

static struct packet heap[PACKETS_MAX]; /* under way, by due time */
static size_t heap_count;
static uint64_t next_order;
static struct packet held[PACKETS_MAX]; /* by stalled links, in order of arrival */
static size_t held_count;

static bool is_before(const struct packet *a, const struct packet *b) {
    return a->due != b->due ? a->due < b->due : a->order < b->order;
}

static void heap_push(struct packet packet) {
    packet.order = next_order++;
    size_t i = heap_count++;
    while (i) {
        size_t parent = (i - 1) / 2;
        if (!is_before(&packet, &heap[parent]))
            break;
        heap[i] = heap[parent];
        i = parent;
    }
    heap[i] = packet;
}

static struct packet heap_pop(void) {
    struct packet top = heap[0], last = heap[--heap_count];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= heap_count)
            break;
        if (child + 1 < heap_count && is_before(&heap[child + 1], &heap[child]))
            child++;
        if (!is_before(&heap[child], &last))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

/* A buffer with one reference; NULL over the bound. */
static struct buffer *make_buffer(size_t length) {
    if (bytes_held + length > BYTES_HELD_MAX)
        return NULL;
    struct buffer *buffer = calloc(1, sizeof *buffer + length);
    if (!buffer)
        return NULL;
    buffer->references = 1;
    buffer->length = (uint32_t)length;
    bytes_held += length;
    return buffer;
}

static void release_buffer(struct buffer *buffer) {
    if (--buffer->references == 0) {
        bytes_held -= buffer->length;
        free(buffer);
    }
}

/* ------------------------------------------------------------------------------------ devices */

static void set_ipv4(int control, struct ifreq *request, const struct port *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = port->ipv4};
    memcpy(&request->ifr_addr, &address, sizeof address);
    if (ioctl(control, SIOCSIFADDR, request))
        die("%s: IPv4 address: %m", port->netns);
    address.sin_addr.s_addr = port->ipv4_prefix ? htonl(~0u << (32 - port->ipv4_prefix)) : 0;
    memcpy(&request->ifr_addr, &address, sizeof address);
    if (ioctl(control, SIOCSIFNETMASK, request))
        die("%s: IPv4 mask: %m", port->netns);
}

static void set_ipv6(const char *device, const struct port *port) {
    struct {
        struct in6_addr address;
        uint32_t prefix;
        int index;
    } request = {port->ipv6, (uint32_t)port->ipv6_prefix, (int)if_nametoindex(device)};
    int control = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    /* A kernel without IPv6 still has a network. */
    if (control < 0 || ioctl(control, SIOCSIFADDR, &request))
        fprintf(stderr, "packet_emulator: %s: no IPv6: %m\n", port->netns);
    if (control >= 0)
        close(control);
}

static void bring_up(int control, const char *device, const char *netns) {
    struct ifreq request = {0};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
    if (ioctl(control, SIOCGIFFLAGS, &request))
        die("%s: %s: %m", netns, device);
    request.ifr_flags |= IFF_UP;
    if (ioctl(control, SIOCSIFFLAGS, &request))
        die("%s: %s up: %m", netns, device);
}

static void make_device(struct port *port) {
    static const char DEVICE[] = "wan";
    port->descriptor = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (port->descriptor < 0)
        die("/dev/net/tun: %m");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    if (is_offloading)
        request.ifr_flags |= IFF_VNET_HDR;
    memcpy(request.ifr_name, DEVICE, sizeof DEVICE);
    if (ioctl(port->descriptor, TUNSETIFF, &request))
        die("%s: TUNSETIFF: %m", port->netns);
    if (is_offloading) {
        int size = sizeof(struct virtio_net_hdr);
        if (ioctl(port->descriptor, TUNSETVNETHDRSZ, &size))
            die("%s: TUNSETVNETHDRSZ: %m", port->netns);
        if (ioctl(port->descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6))
            die("%s: TUNSETOFFLOAD: %m", port->netns);
    }
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (control < 0)
        die("%s: socket: %m", port->netns);
    request.ifr_mtu = device_mtu;
    if (ioctl(control, SIOCSIFMTU, &request))
        die("%s: MTU %d: %m", port->netns, device_mtu);
    request.ifr_qlen = DEVICE_QUEUE;
    if (ioctl(control, SIOCSIFTXQLEN, &request))
        die("%s: queue length: %m", port->netns);
    set_ipv4(control, &request, port);
    bring_up(control, DEVICE, port->netns);
    set_ipv6(DEVICE, port);
    bring_up(control, "lo", port->netns);
    close(control);
}

static void open_port(struct port *port) {
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (home < 0)
        die("/proc/self/ns/net: %m");
    int away = open(port->netns, O_RDONLY | O_CLOEXEC);
    if (away < 0)
        die("%s: %m", port->netns);
    if (setns(away, CLONE_NEWNET))
        die("%s: setns: %m", port->netns);
    close(away);
    make_device(port);
    if (setns(home, CLONE_NEWNET))
        die("setns back: %m");
    close(home);
}

static int parse_prefix(char *text, int bits_max) {
    char *slash = strchr(text, '/'), *end;
    if (!slash)
        die("--port: no prefix length in '%s'", text);
    *slash = 0;
    long bits = strtol(slash + 1, &end, 10);
    if (end == slash + 1 || *end || bits < 0 || bits > bits_max)
        die("--port: bad prefix length '%s'", slash + 1);
    return (int)bits;
}

/* NETNS,IPV4/PREFIX,IPV6/PREFIX */
static void add_port(char *argument) {
    if (port_count == PORTS_MAX)
        die("more than %d ports", PORTS_MAX);
    struct port *port = &ports[port_count++];
    char *netns = strtok(argument, ","), *ipv4 = strtok(NULL, ","), *ipv6 = strtok(NULL, ",");
    if (!netns || !ipv4 || !ipv6 || strtok(NULL, ","))
        die("--port is NETNS,IPV4/PREFIX,IPV6/PREFIX");
    if (snprintf(port->netns, sizeof port->netns, "%s", netns) >= (int)sizeof port->netns)
        die("--port: the name of the namespace is too long");
    port->ipv4_prefix = parse_prefix(ipv4, 32);
    port->ipv6_prefix = parse_prefix(ipv6, 128);
    if (inet_pton(AF_INET, ipv4, &port->ipv4) != 1 || inet_pton(AF_INET6, ipv6, &port->ipv6) != 1)
        die("--port: bad address '%s' or '%s'", ipv4, ipv6);
}

static int find_port(bool is_ipv6, const uint8_t *destination) {
    for (int i = 0; i < port_count; i++) {
        const void *address = is_ipv6 ? (void *)&ports[i].ipv6 : (void *)&ports[i].ipv4;
        if (!memcmp(address, destination, is_ipv6 ? 16 : 4))
            return i;
    }
    return -1;
}

/* ------------------------------------------------------------------------------------- output */

static uint32_t sum16(const uint8_t *data, size_t length, uint32_t sum) {
    for (; length > 1; data += 2, length -= 2)
        sum += (uint32_t)data[0] << 8 | data[1];
    return length ? sum + ((uint32_t)data[0] << 8) : sum;
}

static uint16_t fold(uint32_t sum) {
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

static void put16(uint8_t *at, uint32_t value) {
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value) {
    put16(at, value >> 16);
    put16(at + 2, value);
}

static uint32_t get16(const uint8_t *at) { return (uint32_t)at[0] << 8 | at[1]; }

static uint32_t get32(const uint8_t *at) { return get16(at) << 16 | get16(at + 2); }

/* The headers of a slice of a TSO segment, as the sender's card would have made them. */
static void make_header(const struct packet *packet, uint8_t *header,
                        struct virtio_net_hdr *offload) {
    const struct buffer *buffer = packet->buffer;
    memcpy(header, buffer->data, buffer->header_length);
    uint8_t *tcp = header + buffer->ip_length;
    uint32_t before = packet->offset - buffer->header_length;
    uint32_t tcp_length = (uint32_t)(buffer->header_length - buffer->ip_length) + packet->length;
    uint32_t pseudo;
    put32(tcp + 4, get32(tcp + 4) + before);
    if (packet->offset + packet->length < buffer->length)
        tcp[13] &= (uint8_t)~FIN_PSH; /* only on the last one */
    if (before)
        tcp[13] &= (uint8_t)~CWR; /* only on the first one */
    if (buffer->is_ipv6) {
        put16(header + 4, tcp_length);
        pseudo = sum16(header + 8, 32, TCP + tcp_length);
    } else {
        put16(header + 2, buffer->ip_length + tcp_length);
        put16(header + 4, get16(header + 4) + before / buffer->segment);
        put16(header + 10, 0);
        put16(header + 10, (uint16_t)~fold(sum16(header, buffer->ip_length, 0)));
        pseudo = sum16(header + 12, 8, TCP + tcp_length);
    }
    /* Only the pseudo header's sum: the receiving kernel takes the rest as checked. */
    put16(tcp + 16, fold(pseudo));
    offload->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    offload->csum_start = buffer->ip_length;
    offload->csum_offset = 16;
    offload->hdr_len = buffer->header_length;
    if (packet->length <= buffer->segment) {
        offload->gso_type = VIRTIO_NET_HDR_GSO_NONE;
        offload->gso_size = 0;
    }
}

static void write_packet(const struct packet *packet) {
    struct buffer *buffer = packet->buffer;
    struct virtio_net_hdr offload = buffer->offload;
    uint8_t header[HEADER_BYTES_MAX];
    struct iovec parts[3];
    int count = 0;
    if (is_offloading)
        parts[count++] = (struct iovec){&offload, sizeof offload};
    if (buffer->is_tso) {
        make_header(packet, header, &offload);
        parts[count++] = (struct iovec){header, buffer->header_length};
        parts[count++] = (struct iovec){buffer->data + packet->offset, packet->length};
    } else {
        parts[count++] = (struct iovec){buffer->data, buffer->length};
    }
    /* A device that takes no packet now loses it, as any receiver does. */
    if (writev(ports[packet->to].descriptor, parts, count) < 0 && errno != EAGAIN &&
        errno != EINVAL && errno != EIO)
        fprintf(stderr, "packet_emulator: write to port %d: %m\n", packet->to);
}

/* Delivers what is due; neighbours of one TSO segment leave together. */
static void deliver_due(uint64_t now) {
    while (heap_count && heap[0].due <= now) {
        struct packet packet = heap_pop();
        struct buffer *buffer = packet.buffer;
        struct link *link = &links[packet.from][packet.to];
        if (packet.epoch != link->epoch) {
            link->count.down_drops++;
            release_buffer(buffer);
            continue;
        }
        if (link->is_stalled) {
            held[held_count++] = packet;
            continue;
        }
        uint32_t merged = 1;
        while (buffer->is_tso && heap_count && heap[0].due <= now && heap[0].buffer == buffer &&
               heap[0].offset == packet.offset + packet.length) {
            packet.length += heap_pop().length;
            release_buffer(buffer);
            merged++;
        }
        link->count.packets_out += merged;
        link->count.bytes_out += buffer->is_tso
                                     ? (uint64_t)merged * buffer->header_length + packet.length
                                     : buffer->length;
        write_packet(&packet);
        release_buffer(buffer);
    }
}

/* -------------------------------------------------------------------------------------- input */

/* Draws of one packet: always all of them. */
struct draws {
    double burst, loss, jitter, reorder, duplicate, corrupt, place, bit;
};

static bool is_lost(struct link *link, const struct draws *draws) {
    const struct settings *settings = &link->settings;
    if (link->is_bursting ? draws->burst < settings->burst_leave
                          : draws->burst < settings->burst_enter)
        link->is_bursting = !link->is_bursting;
    return link->is_bursting || draws->loss < settings->loss;
}

/* Bytes that wait for the bottleneck. */
static double queued_bytes(const struct link *link, uint64_t now) {
    double from = (double)now, bits = 0;
    if (link->old_until > from) {
        bits += (link->old_until - from) * link->old_rate;
        from = link->old_until;
    }
    if (link->free_at > from)
        bits += (link->free_at - from) * (double)link->settings.rate;
    return bits / 8e9;
}

/* When the bottleneck has sent a packet of `size`; 0: its queue is full. */
static uint64_t pass_bottleneck(struct link *link, uint32_t size, uint64_t now) {
    if (!link->settings.rate)
        return now;
    double rate = (double)link->settings.rate, start = (double)now;
    if (link->free_at > start)
        start = link->free_at;
    double backlog = queued_bytes(link, now);
    if (backlog > 0 && backlog + size > (double)link->settings.queue)
        return 0;
    if (backlog > (double)link->count.queue_bytes_peak)
        link->count.queue_bytes_peak = (uint64_t)backlog;
    link->free_at = start + size * 8e9 / rate;
    return (uint64_t)link->free_at;
}

static uint64_t due_time(struct link *link, const struct draws *draws, uint64_t sent) {
    const struct settings *settings = &link->settings;
    double wander = (2 * draws->jitter - 1) * (double)settings->jitter;
    double delay = (double)settings->delay + wander;
    uint64_t due = sent + (delay > 0 ? (uint64_t)delay : 0);
    if (draws->reorder < settings->reorder) {
        link->count.reordered++;
        return due + settings->reorder_by;
    }
    if (due < link->last_due)
        due = link->last_due;
    link->last_due = due;
    return due;
}

/* A copy with one flipped bit, or the same buffer where the kernel's checksum would reveal it. */
static struct buffer *corrupt_buffer(struct link *link, struct buffer *buffer, uint32_t offset,
                                     uint32_t length, const struct draws *draws) {
    bool is_hidden = buffer->is_tso || buffer->offload.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
    uint32_t first = buffer->is_tso ? offset : 60,
             end = buffer->is_tso ? offset + length : buffer->length;
    struct buffer *copy = is_hidden && first < end ? make_buffer(buffer->length) : NULL;
    if (!copy) {
        buffer->references++;
        return buffer;
    }
    memcpy(copy->data, buffer->data, buffer->length);
    copy->header_length = buffer->header_length;
    copy->ip_length = buffer->ip_length;
    copy->segment = buffer->segment;
    copy->is_ipv6 = buffer->is_ipv6;
    copy->is_tso = buffer->is_tso;
    copy->offload = buffer->offload;
    copy->data[first + (uint32_t)(draws->place * (end - first))] ^=
        (uint8_t)(1u << (int)(draws->bit * 8));
    link->count.corrupted++;
    return copy;
}

/* Decides the fate of one packet: a whole buffer, or a slice of a TSO segment. */
static void judge(int from, int to, struct buffer *buffer, uint32_t offset, uint32_t length,
                  uint64_t now) {
    struct link *link = &links[from][to];
    struct chance *chance = &link->chance;
    struct draws draws = {draw(chance), draw(chance), draw(chance), draw(chance),
                          draw(chance), draw(chance), draw(chance), draw(chance)};
    uint32_t size = buffer->is_tso ? buffer->header_length + length : buffer->length;
    link->count.packets_in++;
    link->count.bytes_in += size;
    if (link->is_down) {
        link->count.down_drops++;
        return;
    }
    if (link->settings.mtu && size > link->settings.mtu) {
        link->count.oversized++;
        return;
    }
    if (is_lost(link, &draws)) {
        link->count.lost++;
        return;
    }
    uint64_t sent = pass_bottleneck(link, size, now);
    if (!sent) {
        link->count.queue_drops++;
        return;
    }
    if (heap_count + held_count + 2 > PACKETS_MAX) {
        overflow++;
        return;
    }
    struct packet packet = {
        .due = due_time(link, &draws, sent),
        .epoch = link->epoch,
        .offset = offset,
        .length = length,
        .from = (uint8_t)from,
        .to = (uint8_t)to,
    };
    if (draws.corrupt < link->settings.corrupt) {
        packet.buffer = corrupt_buffer(link, buffer, offset, length, &draws);
    } else {
        packet.buffer = buffer;
        buffer->references++;
    }
    heap_push(packet);
    if (draws.duplicate < link->settings.duplicate) {
        packet.buffer->references++;
        heap_push(packet);
        link->count.duplicated++;
    }
}

/* Finds the headers of a TSO segment; false: it is passed on whole. */
static bool parse_segment(struct buffer *buffer) {
    const uint8_t *data = buffer->data;
    if (buffer->offload.gso_type == VIRTIO_NET_HDR_GSO_NONE || !buffer->offload.gso_size)
        return false;
    uint32_t ip_length = buffer->is_ipv6 ? 40 : (data[0] & 15u) * 4;
    if (ip_length < 20 || buffer->length < ip_length + 20 || data[buffer->is_ipv6 ? 6 : 9] != TCP)
        return false;
    uint32_t tcp_length = (data[ip_length + 12] >> 4) * 4u;
    if (tcp_length < 20 || buffer->length <= ip_length + tcp_length)
        return false;
    buffer->ip_length = (uint16_t)ip_length;
    buffer->header_length = (uint16_t)(ip_length + tcp_length);
    buffer->segment = buffer->offload.gso_size;
    return true;
}

static void take_packet(int from, const uint8_t *raw, size_t size, uint64_t now) {
    struct virtio_net_hdr offload = {0};
    if (is_offloading) {
        if (size < sizeof offload)
            return;
        memcpy(&offload, raw, sizeof offload);
        raw += sizeof offload;
        size -= sizeof offload;
    }
    bool is_ipv6 = size && raw[0] >> 4 == 6;
    if (size < (is_ipv6 ? 40 : 20))
        return;
    int to = find_port(is_ipv6, raw + (is_ipv6 ? 24 : 16));
    if (to < 0 || to == from) {
        unroutable++;
        return;
    }
    struct buffer *buffer = make_buffer(size);
    if (!buffer) {
        overflow++;
        return;
    }
    memcpy(buffer->data, raw, size);
    buffer->offload = offload;
    buffer->is_ipv6 = is_ipv6;
    buffer->is_tso = parse_segment(buffer);
    if (buffer->is_tso) {
        uint32_t end = buffer->length, step = buffer->segment;
        for (uint32_t offset = buffer->header_length; offset < end; offset += step)
            judge(from, to, buffer, offset, end - offset < step ? end - offset : step, now);
    } else {
        judge(from, to, buffer, 0, 0, now);
    }
    release_buffer(buffer);
}

/* ------------------------------------------------------------------------------------ control */

static void take_down(struct link *link, uint64_t up_at) {
    link->is_down = true;
    link->is_stalled = false;
    link->epoch++;
    link->free_at = link->old_until = 0;
    link->last_due = 0;
    link->up_at = up_at;
}

static void take_up(int from, int to, uint64_t now) {
    struct link *link = &links[from][to];
    link->is_down = link->is_stalled = false;
    link->up_at = 0;
    size_t kept = 0;
    for (size_t i = 0; i < held_count; i++) { /* held packets leave now, in order */
        if (held[i].from == from && held[i].to == to) {
            held[i].due = now;
            heap_push(held[i]);
        } else {
            held[kept++] = held[i];
        }
    }
    held_count = kept;
}

static bool parse_number(const char *text, uint64_t *value) {
    char *end;
    if (*text < '0' || *text > '9')
        return false;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return !*end && !errno && *value <= NUMBER_MAX;
}

static bool parse_chance(const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    return end != text && !*end && *value >= 0 && *value <= 1;
}

static bool set_one(struct settings *settings, const char *key, const char *value) {
    const struct {
        const char *key;
        uint64_t *number;
        double *chance;
    } known[] = {
        {"rate", &settings->rate, NULL},
        {"queue", &settings->queue, NULL},
        {"delay", &settings->delay, NULL},
        {"jitter", &settings->jitter, NULL},
        {"reorder_by", &settings->reorder_by, NULL},
        {"mtu", &settings->mtu, NULL},
        {"loss", NULL, &settings->loss},
        {"burst_enter", NULL, &settings->burst_enter},
        {"burst_leave", NULL, &settings->burst_leave},
        {"reorder", NULL, &settings->reorder},
        {"duplicate", NULL, &settings->duplicate},
        {"corrupt", NULL, &settings->corrupt},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(key, known[i].key))
            return known[i].number ? parse_number(value, known[i].number)
                                   : parse_chance(value, known[i].chance);
    return false;
}

/* All of the settings or none. */
static bool set_link(struct link *link, char **words, int count, uint64_t now) {
    struct settings settings = link->settings;
    for (int i = 0; i < count; i++) {
        char *value = strchr(words[i], '=');
        if (!value)
            return false;
        *value++ = 0;
        if (!set_one(&settings, words[i], value))
            return false;
    }
    if (settings.rate != link->settings.rate && link->free_at > (double)now) {
        /* What is queued keeps its times, and its size. */
        link->old_rate = queued_bytes(link, now) * 8e9 / (link->free_at - (double)now);
        link->old_until = link->free_at;
    }
    link->settings = settings;
    if (settings.burst_enter <= 0)
        link->is_bursting = false;
    return true;
}

static void put_link(FILE *out, int from, int to) {
    const struct link *link = &links[from][to];
    const struct counters *count = &link->count;
    const struct {
        const char *key;
        uint64_t value;
    } shown[] = {
        {"packets_in", count->packets_in},
        {"bytes_in", count->bytes_in},
        {"packets_out", count->packets_out},
        {"bytes_out", count->bytes_out},
        {"lost", count->lost},
        {"oversized", count->oversized},
        {"queue_drops", count->queue_drops},
        {"down_drops", count->down_drops},
        {"duplicated", count->duplicated},
        {"reordered", count->reordered},
        {"corrupted", count->corrupted},
        {"queue_bytes_peak", count->queue_bytes_peak},
    };
    fprintf(out, "{\"from\":%d,\"to\":%d,\"state\":\"%s\"", from, to,
            link->is_down      ? "down"
            : link->is_stalled ? "stalled"
                               : "up");
    for (size_t i = 0; i < sizeof shown / sizeof *shown; i++)
        fprintf(out, ",\"%s\":%" PRIu64, shown[i].key, shown[i].value);
    fputc('}', out);
}

static void put_statistics(FILE *out) {
    fprintf(out,
            "{\"ok\":true,\"packets_under_way\":%zu,\"packets_held\":%zu,\"bytes_held\":%" PRIu64
            ",\"unroutable\":%" PRIu64 ",\"overflow\":%" PRIu64 ",\"links\":[",
            heap_count, held_count, bytes_held, unroutable, overflow);
    const char *separator = "";
    for (int from = 0; from < port_count; from++)
        for (int to = 0; to < port_count; to++)
            if (from != to) {
                fputs(separator, out);
                put_link(out, from, to);
                separator = ",";
            }
    fputs("]}\n", out);
}

static bool change_link(char **words, int count, uint64_t now) {
    uint64_t from, to, duration;
    if (count < 3 || !parse_number(words[1], &from) || !parse_number(words[2], &to) || from == to ||
        from >= (uint64_t)port_count || to >= (uint64_t)port_count)
        return false;
    struct link *link = &links[from][to];
    if (!strcmp(words[0], "set"))
        return set_link(link, words + 3, count - 3, now);
    if (!strcmp(words[0], "flap") && count == 4 && parse_number(words[3], &duration)) {
        take_down(link, now + duration);
        return true;
    }
    if (count != 3)
        return false;
    if (!strcmp(words[0], "down"))
        take_down(link, 0);
    else if (!strcmp(words[0], "up"))
        take_up((int)from, (int)to, now);
    else if (!strcmp(words[0], "stall")) {
        link->is_stalled = true;
        link->is_down = false;
        link->up_at = 0;
    } else
        return false;
    return true;
}

static void run_command(char *line, FILE *out, uint64_t now) {
    char *words[WORDS_MAX], *state;
    int count = 0;
    for (char *word = strtok_r(line, " ", &state); word; word = strtok_r(NULL, " ", &state)) {
        if (count == WORDS_MAX) {
            fputs("{\"ok\":false,\"error\":\"too many words\"}\n", out);
            return;
        }
        words[count++] = word;
    }
    if (count == 1 && !strcmp(words[0], "stats"))
        put_statistics(out);
    else if (change_link(words, count, now))
        fputs("{\"ok\":true}\n", out);
    else
        fputs("{\"ok\":false,\"error\":\"bad command, link or setting\"}\n", out);
}

struct client {
    int descriptor; /* -1: free */
    size_t used;
    char line[LINE_BYTES_MAX];
};
static struct client clients[CLIENTS_MAX];
static char answer[ANSWER_BYTES_MAX];

static void close_client(struct client *client) {
    close(client->descriptor);
    client->descriptor = -1;
}

/* Answers one line; false: the client does not take the answer. */
static bool answer_line(struct client *client, char *line, uint64_t now) {
    FILE *out = fmemopen(answer, sizeof answer, "w");
    if (!out)
        return false;
    run_command(line, out, now);
    bool is_whole = !ferror(out);
    long length = ftell(out);
    if (fclose(out) || !is_whole || length <= 0)
        return false;
    return send(client->descriptor, answer, (size_t)length, MSG_NOSIGNAL) == length;
}

static void serve_client(struct client *client, uint64_t now) {
    ssize_t got =
        read(client->descriptor, client->line + client->used, sizeof client->line - client->used);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        close_client(client);
        return;
    }
    client->used += (size_t)got;
    char *newline;
    while ((newline = memchr(client->line, '\n', client->used))) {
        *newline = 0;
        if (!answer_line(client, client->line, now)) {
            close_client(client);
            return;
        }
        size_t taken = (size_t)(newline - client->line) + 1;
        client->used -= taken;
        memmove(client->line, newline + 1, client->used);
    }
    if (client->used == sizeof client->line) /* a line over the bound */
        close_client(client);
}

static void accept_client(int listener) {
    int descriptor = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (descriptor < 0)
        return;
    int room = ANSWER_BYTES_MAX;
    setsockopt(descriptor, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
    for (int i = 0; i < CLIENTS_MAX; i++)
        if (clients[i].descriptor < 0) {
            clients[i].descriptor = descriptor;
            clients[i].used = 0;
            return;
        }
    close(descriptor);
}

/* The path appears when it can be connected to: whoever sees it may use it. */
static int open_control(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s.new", path);
    if (length >= (int)sizeof address.sun_path)
        die("%s: the path is too long for a socket", path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    umask(0177);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) ||
        listen(listener, CLIENTS_MAX) || rename(address.sun_path, path))
        die("%s: %m", path);
    return listener;
}

/* --------------------------------------------------------------------------------------- loop */

static volatile sig_atomic_t is_ending;

static void handle_signal(int number) {
    (void)number;
    is_ending = 1;
}

static uint64_t next_wake(uint64_t now) {
    uint64_t wake = now + SECOND;
    if (heap_count && heap[0].due < wake)
        wake = heap[0].due;
    for (int from = 0; from < port_count; from++)
        for (int to = 0; to < port_count; to++)
            if (links[from][to].up_at && links[from][to].up_at < wake)
                wake = links[from][to].up_at;
    return wake < now + tick ? now + tick : wake;
}

static void end_flaps(uint64_t now) {
    for (int from = 0; from < port_count; from++)
        for (int to = 0; to < port_count; to++)
            if (links[from][to].up_at && now >= links[from][to].up_at)
                take_up(from, to, now);
}

static void read_port(int from, uint64_t now) {
    static uint8_t raw[PACKET_BYTES_MAX];
    for (int i = 0; i < READ_BATCH; i++) {
        ssize_t size = read(ports[from].descriptor, raw, sizeof raw);
        if (size <= 0)
            return;
        take_packet(from, raw, (size_t)size, now);
    }
}

static void run(int listener, const sigset_t *unblocked) {
    struct pollfd polled[PORTS_MAX + 1 + CLIENTS_MAX];
    while (!is_ending) {
        uint64_t now = clock_ns(), wait = next_wake(now) - now;
        int count = 0;
        for (int i = 0; i < port_count; i++)
            polled[count++] = (struct pollfd){.fd = ports[i].descriptor, .events = POLLIN};
        polled[count++] = (struct pollfd){.fd = listener, .events = POLLIN};
        for (int i = 0; i < CLIENTS_MAX; i++) /* poll ignores negative descriptors */
            polled[count++] = (struct pollfd){.fd = clients[i].descriptor, .events = POLLIN};
        struct timespec timeout = {(time_t)(wait / SECOND), (long)(wait % SECOND)};
        int ready = ppoll(polled, (nfds_t)count, &timeout, unblocked);
        if (ready < 0 && errno != EINTR)
            die("poll: %m");
        now = clock_ns();
        end_flaps(now);
        if (ready > 0) {
            for (int i = 0; i < port_count; i++) {
                if (polled[i].revents & POLLIN)
                    read_port(i, now);
                else if (polled[i].revents)
                    die("%s: the device is gone", ports[i].netns);
            }
            for (int i = 0; i < CLIENTS_MAX; i++)
                if (polled[port_count + 1 + i].revents)
                    serve_client(&clients[i], now);
            if (polled[port_count].revents)
                accept_client(listener);
        }
        deliver_due(now = clock_ns());
        /* Let arrivals gather for half a tick instead of waking for each. */
        if (ready > 0 && (!heap_count || heap[0].due > now + tick / 2)) {
            struct timespec nap = {0, (long)(tick / 2)};
            nanosleep(&nap, NULL);
        }
    }
}

static void seed_links(uint64_t seed) {
    for (int from = 0; from < PORTS_MAX; from++)
        for (int to = 0; to < PORTS_MAX; to++) {
            uint64_t x = seed * 1000003 + (uint64_t)from * 257 + (uint64_t)to;
            for (int i = 0; i < 4; i++)
                links[from][to].chance.state[i] = splitmix(&x);
        }
}

static void close_all(int listener, const char *path) {
    unlink(path);
    close(listener);
    while (heap_count)
        release_buffer(heap_pop().buffer);
    while (held_count)
        release_buffer(held[--held_count].buffer);
    for (int i = 0; i < CLIENTS_MAX; i++)
        if (clients[i].descriptor >= 0)
            close_client(&clients[i]);
    for (int i = 0; i < port_count; i++)
        close(ports[i].descriptor);
}

static uint64_t number_argument(const char *text, uint64_t smallest, uint64_t largest) {
    uint64_t value;
    if (!parse_number(text, &value) || value < smallest || value > largest)
        die("'%s' is not a number from %" PRIu64 " to %" PRIu64, text, smallest, largest);
    return value;
}

int main(int argc, char **argv) {
    static const struct option options[] = {
        {"port", 1, 0, 'p'}, {"control", 1, 0, 'c'},    {"seed", 1, 0, 's'},     {"mtu", 1, 0, 'm'},
        {"tick", 1, 0, 't'}, {"no-offload", 0, 0, 'n'}, {"realtime", 0, 0, 'r'}, {0, 0, 0, 0},
    };
    const char *control = NULL;
    uint64_t seed = 1;
    bool is_realtime = false;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (option == 'p')
            add_port(optarg);
        else if (option == 'c')
            control = optarg;
        else if (option == 's')
            seed = number_argument(optarg, 0, NUMBER_MAX);
        else if (option == 'm')
            device_mtu = (int)number_argument(optarg, 576, 65535);
        else if (option == 't')
            tick = number_argument(optarg, 10000, SECOND / 10);
        else if (option == 'n')
            is_offloading = false;
        else if (option == 'r')
            is_realtime = true;
        else
            return 2;
    }
    if (port_count < 2 || !control || optind != argc)
        die("needs --control PATH and two or more --port NETNS,IPV4/PREFIX,IPV6/PREFIX");
    seed_links(seed);
    for (int i = 0; i < CLIENTS_MAX; i++)
        clients[i].descriptor = -1;
    prctl(PR_SET_TIMERSLACK, 1000UL);
    struct sched_param priority = {.sched_priority = 10};
    if (is_realtime && sched_setscheduler(0, SCHED_FIFO, &priority))
        die("SCHED_FIFO: %m");
    /* Signals come only inside ppoll, so that none is missed just before it. */
    sigset_t blocked, unblocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGINT);
    sigaddset(&blocked, SIGTERM);
    sigprocmask(SIG_BLOCK, &blocked, &unblocked);
    sigdelset(&unblocked, SIGINT);
    sigdelset(&unblocked, SIGTERM);
    struct sigaction action = {.sa_handler = handle_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    for (int i = 0; i < port_count; i++)
        open_port(&ports[i]);
    int listener = open_control(control);
    run(listener, &unblocked);
    close_all(listener, control);
    return 0;
}
