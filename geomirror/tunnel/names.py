"""Names and endpoints: checked once, where they enter, and safe in file names, URIs and logs after.

A name is plain ASCII, so that no two names look alike and none can forge a line of a log; names
that differ only in case are the same name for duplicates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from geomirror.errors import ConfigError, GeomirrorError
from geomirror.limits import PRODUCTION

NAME_LENGTH_MAX = 32
"""Characters; a node name is one label of a DNS name and part of file names."""
ENDPOINT_LENGTH_MAX = 128
"""Characters of `HOST:PORT`."""
RESERVED_NAMES = frozenset({"all", "any", "authority", "localhost", "none", "self"})
"""Words that commands or host files could take for something else than a node."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?\Z")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
_HOST_V6 = re.compile(r"\[([0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,16})?)\]\Z")


def check_name(text: object, kind: str, *, error: type[GeomirrorError] = ConfigError) -> str:
    """Return `text` if it may name a network, site or node.

    :param kind: "network", "site" or "node", for the message.
    :raises GeomirrorError: `error`; hostile text is not repeated in the message.
    """
    if not isinstance(text, str) or not _NAME.match(text) or len(text) > NAME_LENGTH_MAX:
        raise error(
            f"a {kind} name needs 1 to {NAME_LENGTH_MAX} ASCII letters, digits, '-' or '_', "
            "with a letter or digit at both ends",
            hint=f"choose another {kind} name",
        )
    if kind == "node" and text.casefold() in RESERVED_NAMES:
        raise error(f'the node name "{text}" is reserved', hint="choose another node name")
    return text


def propose_name(host_name: str) -> str:
    """Make a node name of a host's name: its first label, unsuitable characters replaced."""
    label = re.sub(r"[^A-Za-z0-9_-]", "-", host_name.split(".")[0])[:NAME_LENGTH_MAX].strip("-_")
    if not label or label.casefold() in RESERVED_NAMES:
        return "node-1"
    return label


def split_endpoint(text: object, *, error: type[GeomirrorError] = ConfigError) -> tuple[str, int]:
    """Split `HOST:PORT` or `[IPV6]:PORT`.

    :returns: host without brackets, port 0…65535 (0: any free port, for listening only).
    :raises GeomirrorError: `error`.
    """
    if isinstance(text, str) and len(text) <= ENDPOINT_LENGTH_MAX:
        host, separator, port = text.rpartition(":")
        if separator and re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) and int(port) <= 65535:
            bracketed = _HOST_V6.match(host)
            if bracketed:
                return bracketed.group(1), int(port)
            if _HOST.match(host):
                return host, int(port)
    raise error("an endpoint is HOST:PORT or [IPV6]:PORT", hint='like "203.0.113.7:7701"')


def join_endpoint(host: str, port: int) -> str:
    """The text form of a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_endpoints(
    texts: Iterable[object], *, error: type[GeomirrorError] = ConfigError
) -> tuple[str, ...]:
    """Validate endpoints that others will dial; duplicates are dropped.

    :raises GeomirrorError: `error`, also for more than `endpoints_max` of them or a port 0.
    """
    found: dict[str, None] = {}
    for text in texts:
        host, port = split_endpoint(text, error=error)
        if port == 0:
            raise error("an endpoint of a peer needs a port", hint='like "203.0.113.7:7701"')
        found[join_endpoint(host, port)] = None
        if len(found) > PRODUCTION.endpoints_max:
            raise error(f"a node has at most {PRODUCTION.endpoints_max} endpoints")
    return tuple(found)
