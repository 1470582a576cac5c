"""Which of the endpoints that a joiner names are given to the others to dial."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from geomirror.errors import RefusedError
from geomirror.tunnel.names import check_endpoints, join_endpoint, split_endpoint

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")


def dialable(texts: Sequence[str], observed_host: str) -> tuple[str, ...]:
    """What others will dial: "any address" becomes the one that the authority saw.

    Link-local and multicast addresses are dropped: no peer is there, but a cloud's metadata service
    may be (169.254.169.254), and members must not be sent to it.

    :raises RefusedError: one is no endpoint, or there are too many.
    """
    found: list[str] = []
    for text in texts:
        host, port = split_endpoint(text, error=RefusedError)
        address = _address_of(host)
        if address is None or not (address.is_link_local or address.is_multicast):
            is_any = address is not None and address.is_unspecified
            found.append(join_endpoint(observed_host, port) if is_any else text)
    return check_endpoints(found, error=RefusedError)


def _address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, None for a name.

    :raises RefusedError: it is neither: what ends in a number is an address to resolvers, in
        spellings that would pass for a name here (0xa9fea9fe, 169.254.43518).
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            raise RefusedError("an endpoint's address is not written as usual") from None
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
