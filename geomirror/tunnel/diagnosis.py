"""What is wrong between two nodes, told apart: from what attempts met to a cause and a next step.

```
 name ─▶ connect ─▶ proxy ─▶ websocket ─▶ handshake ─▶ certificate ─▶ verdict of the peer
```
An attempt ends at one of these stages; the stage, the error there and the certificate that was
shown say which of the causes it is. All look alike as "no link": nobody listens, packets vanish,
somebody opens TLS, a clock is wrong, a node was revoked. Decides only; `diagnosis_io` tries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography import x509

from geomirror.environment import SECOND
from geomirror.errors import AuthError, LinkError, UnreachableError
from geomirror.tunnel.certificates import Claims, check_issued_by, load_certificate, read_claims
from geomirror.tunnel.link_path import WORDS, parse_path, rank_of

CLOCK_SKEW_NS = 60 * SECOND
"""Certificates forgive five minutes; a clock that is a minute wrong will get there."""

Stage = Literal["name", "connect", "proxy", "websocket", "handshake", "certificate", "peer", "up"]
Failure = Literal[
    "", "not_found", "refused", "timeout", "unreachable", "closed", "status", "nonsense"
]

NEXT = {
    "daemon_down": 'run "geomirror node run" (or: systemctl start geomirror)',
    "name_not_found": "give an address instead of the name: [peers.{peer}] endpoints in {config}",
    "refused": 'on "{peer}" run "geomirror node run"; check the port with "geomirror node list"',
    "black_hole": "let TCP to {target} through the firewalls, or set links.proxy in {config}",
    "unreachable": "look at the routes of this host: ip route get {host}",
    "not_tls": 'check the endpoint with "geomirror node list"; another program answers there',
    "intercepted": "exempt {target} from TLS inspection, or add a wss:// URL to [peers.{peer}]"
    " endpoints in {config}",
    "foreign_network": 'check the endpoint with "geomirror node list"',
    "wrong_node": 'check the endpoint with "geomirror node list"',
    "clock_skew": "set the clock of this host: timedatectl set-ntp true",
    "certificate_expired": 'restart "geomirror node run" on "{holder}": it renews its certificate',
    "certificate_not_yet_valid": 'compare the clocks here and on "{holder}": timedatectl',
    "certificate_revoked": 'join anew with a token of "geomirror token create", in an empty data'
    " directory",
    "not_accepted": 'run "geomirror doctor" on "{peer}"',
    "proxy_not_found": "check links.proxy in {config}",
    "proxy_unreachable": "check links.proxy in {config}",
    "proxy_wants_credentials": "put USER:PASSWORD into a file of mode 0600 and name it as"
    " links.proxy_credentials in {config}",
    "proxy_refused": "ask for {target} to be let out; many proxies let out port 443 only",
    "proxy_broken": "check links.proxy in {config}: it does not answer as an HTTP proxy",
    "websocket_refused": "check the URL, and that the front end passes WebSockets on",
    "not_connected": 'run "geomirror doctor" on "{peer}": it dials, this node cannot',
    "udp_blocked": "let UDP to the ports from [tunnel] port on through the firewalls",
}
"""The next step of each cause; `config` is the file."""

_AUTH = {
    *("intercepted", "foreign_network", "wrong_node", "clock_skew", "certificate_expired"),
    *("certificate_not_yet_valid", "certificate_revoked", "not_accepted"),
}


@dataclass(frozen=True)
class Finding:
    """One sentence of a diagnosis."""

    code: str
    """A key of `NEXT`, or `ok`."""
    subject: str
    """What was looked at, like `east-1 at 203.0.113.7:7701`."""
    text: str
    next: str = ""
    is_problem: bool = False
    """False: all is well, or another path does what this one does not."""


@dataclass(frozen=True)
class PathFacts:
    """What happened on one path."""

    path: str
    stage: Stage
    """The first that failed; `up`: none."""
    failure: Failure = ""
    detail: str = ""
    """The system's or the other side's words for it."""
    status: int = 0
    """Of a proxy's answer."""
    certificate: bytes = b""
    """DER, as the other side showed it without being believed."""


@dataclass(frozen=True)
class Place:
    """Who looks, at whom, and what is believed."""

    peer: str
    config: str
    """Path of the configuration file."""
    node: str
    network: str
    authority: x509.Certificate
    revoked: frozenset[str] = frozenset()
    """Node ids."""


def judge_path(facts: PathFacts, place: Place, wall_ns: int) -> Finding:
    """The cause of what happened on a path; a problem unless it is `ok`."""
    if facts.stage == "up":
        code, text = "ok", f"{WORDS[rank_of(facts.path)]} works"
    elif facts.stage == "certificate":
        code, text = _judge_certificate(facts, place, wall_ns)
    elif facts.stage == "peer":
        code, text = _judge_answer(facts, place)
    else:
        code, text = _judge_way(facts)
    holder = place.node if facts.stage == "peer" else place.peer
    return _finding(code, f"{place.peer} at {facts.path}", text, place, facts.path, holder)


def _finding(
    code: str, subject: str, text: str, place: Place, path: str = "", holder: str = ""
) -> Finding:
    way = parse_path(path) if path else None
    step = NEXT.get(code, "").format(
        peer=place.peer,
        config=place.config,
        target=way.target if way else "",
        host=way.host if way else "",
        holder=holder or place.peer,
    )
    return Finding(code, subject, text, step, is_problem=code != "ok")


def _judge_way(facts: PathFacts) -> tuple[str, str]:
    path = parse_path(facts.path)
    proxy, target = path.proxy, path.target
    if facts.stage == "name":
        code = "proxy_not_found" if proxy else "name_not_found"
        return code, f"the name {_host(proxy or target)} is not known here: {facts.detail}"
    if facts.stage == "connect":
        where = f"the proxy {proxy}" if proxy else target
        said = {
            "refused": f"{where} refuses the connection: the host is there, nobody listens",
            "timeout": f"{where} does not answer: packets vanish, as behind a firewall that drops",
        }.get(facts.failure, f"{where} cannot be reached: {facts.detail}")
        direct = {"refused": "refused", "timeout": "black_hole"}.get(facts.failure, "unreachable")
        return ("proxy_unreachable" if proxy else direct), said
    if facts.stage == "proxy":
        if facts.status == 407:
            return "proxy_wants_credentials", f"the proxy {proxy} {facts.detail} (407)"
        if facts.status in (502, 503, 504):
            return "black_hole", f"the proxy {proxy} cannot reach {target} ({facts.status})"
        if facts.status:
            return "proxy_refused", f"the proxy {proxy} does not let {target} out ({facts.status})"
        return "proxy_broken", f"the proxy {proxy} does not answer as one: {facts.detail}"
    if facts.stage == "websocket":
        return "websocket_refused", f"no WebSocket opens at {target}: {facts.detail}"
    if facts.failure == "timeout":
        return "black_hole", f"{target} takes the connection and then says nothing"
    return "not_tls", f"what answers at {target} does not speak TLS 1.3: {facts.detail}"


def _host(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")


def _judge_certificate(facts: PathFacts, place: Place, wall_ns: int) -> tuple[str, str]:
    target = parse_path(facts.path).target
    try:
        certificate = load_certificate(facts.certificate)
        check_issued_by(certificate, place.authority)
        claims = read_claims(certificate)
    except AuthError:
        return _judge_foreign(facts.certificate, target)
    if claims.name != place.peer:
        return "wrong_node", f'"{claims.name}" answers at {target}, not "{place.peer}"'
    if claims.node_id in place.revoked:
        return "certificate_revoked", f'"{place.peer}" is revoked in this network'
    return _judge_dates(claims, wall_ns) or (
        "not_tls",
        f"the handshake with {target} fails although its certificate is right: {facts.detail}",
    )


def _judge_dates(claims: Claims, wall_ns: int) -> tuple[str, str] | None:
    if wall_ns < claims.not_before_ns:
        seconds = (claims.not_before_ns - wall_ns) // SECOND
        text = f'the certificate of "{claims.name}" begins in {seconds} s by this host\'s clock'
        return "certificate_not_yet_valid", text
    if wall_ns >= claims.not_after_ns:
        seconds = (wall_ns - claims.not_after_ns) // SECOND
        text = f'the certificate of "{claims.name}" ended {seconds} s ago by this host\'s clock'
        return "certificate_expired", text
    return None


def _judge_foreign(der: bytes, target: str) -> tuple[str, str]:
    try:
        certificate = x509.load_der_x509_certificate(der)
        issuer = certificate.issuer.rfc4514_string()
    except (ValueError, TypeError):
        issuer = "a certificate that cannot be read"
    if issuer == "CN=nobody":
        return "foreign_network", f"a node of another network answers at {target}"
    try:
        network = read_claims(load_certificate(der)).network
    except AuthError:
        name = "".join(c if c.isprintable() else "?" for c in issuer)[:120]
        shown = f"a foreign certificate (issued by {name}) is shown for {target}"
        return "intercepted", f"{shown}: TLS is opened on the way"
    return "foreign_network", f'a node of the network "{network}" answers at {target}'


def _judge_answer(facts: PathFacts, place: Place) -> tuple[str, str]:
    """What the peer says of this node, in the words of `TlsDriver.admit`."""
    if "revoked" in facts.detail:
        return "certificate_revoked", f'"{place.peer}" says that this node is revoked'
    if "expired" in facts.detail:
        return "certificate_expired", f'"{place.peer}" says: {facts.detail}'
    if "is valid only in" in facts.detail:
        return "clock_skew", f'"{place.peer}" says: {facts.detail}'
    return "not_accepted", f'"{place.peer}" does not accept this node: {facts.detail}'


def judge_clock(skew_ns: int | None, own: Claims, place: Place, wall_ns: int) -> Finding:
    """This host's clock.

    :param skew_ns: ours minus the authority's; None: it could not be asked.
    """
    subject = "the clock of this host"
    if skew_ns is not None and abs(skew_ns) >= CLOCK_SKEW_NS:
        direction = "ahead of" if skew_ns > 0 else "behind"
        text = f"it is {abs(skew_ns) // SECOND} s {direction} the authority's"
        return _finding("clock_skew", subject, text, place)
    if wall_ns < own.not_before_ns:
        text = "it is before the beginning of this node's own certificate"
        return _finding("clock_skew", subject, text, place)
    if skew_ns is None:
        return Finding("ok", subject, "the authority cannot be asked for the time")
    return Finding("ok", subject, f"within {abs(skew_ns) / SECOND:.1f} s of the authority's")


def judge_own(own: Claims, place: Place, wall_ns: int) -> Finding:
    """This node's own certificate."""
    subject = "the certificate of this node"
    if own.node_id in place.revoked:
        text = f'"{place.node}" is revoked in the network "{place.network}"'
        return _finding("certificate_revoked", subject, text, place)
    if wall_ns >= own.not_after_ns:
        seconds = (wall_ns - own.not_after_ns) // SECOND
        text = f"it ended {seconds} s ago by this host's clock"
        return _finding("certificate_expired", subject, text, place, holder=place.node)
    hours = (own.not_after_ns - wall_ns) / (3600 * SECOND)
    return Finding("ok", subject, f"valid for another {hours:.1f} h")


def judge_peer(
    found: Sequence[Finding], place: Place, *, is_connected: bool | None
) -> list[Finding]:
    """All paths to a peer: while one works, or the link is up, the others are no problem.

    :param is_connected: whether the daemon has a link; None: it does not run.
    """
    if not found:
        if is_connected:
            return [Finding("ok", place.peer, "it does not listen, but has dialled this node")]
        text = "it does not listen and has not dialled this node"
        return [_finding("not_connected", place.peer, text, place)]
    if any(finding.code == "ok" for finding in found) or is_connected:
        return [Finding(f.code, f.subject, f.text, f.next) for f in found]
    return list(found)


def judge_daemon(place: Place, *, is_running: bool) -> Finding:
    """The daemon of this node."""
    if is_running:
        return Finding("ok", "the daemon of this node", "it answers")
    return _finding("daemon_down", "the daemon of this node", "it does not run", place)


def judge_udp(peer: str, state: str, place: Place, *, is_connected: bool) -> Finding | None:
    """The WireGuard tunnel to a peer, by its state in `tunnel status`; None: nothing to say."""
    if state == "up":
        return Finding("ok", f"the tunnel to {peer}", "UDP gets through")
    if state in ("connecting", "silent") and is_connected:
        text = "the link over TCP is up and no UDP comes through: it is dropped on the way"
        return _finding("udp_blocked", f"the tunnel to {peer}", text, place)
    return None


def exit_code(findings: Sequence[Finding]) -> int:
    """0, or that of the gravest problem: identity before network before a daemon that is down."""
    problems = {finding.code for finding in findings if finding.is_problem}
    if problems & _AUTH:
        return AuthError.exit_code
    if problems - {"daemon_down"}:
        return LinkError.exit_code
    return UnreachableError.exit_code if problems else 0
