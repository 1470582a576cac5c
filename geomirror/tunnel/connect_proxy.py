"""The HTTP CONNECT exchange: what is asked of a proxy, and what its answer means.

```
 CONNECT HOST:PORT ──▶ proxy        2xx, empty line: from here on the bytes are the target's
                                    407: it wants credentials · 403: it does not let this out
                                    502, 503, 504: it cannot reach the target itself
```
The bytes behind a good answer belong to the target, which speaks TLS and waits for us: a proxy that
sends some is not believed. Credentials are in a file of their own and in no message.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field

from geomirror.errors import ConfigError, LinkError, RemoteProtocolError
from geomirror.tunnel.http_head import Head, HeadReader

CREDENTIALS_BYTES_MAX = 512
_SCHEME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,32}")


@dataclass(frozen=True)
class Credentials:
    """A user name and a password for the proxy."""

    value: str = field(repr=False)
    """Base64 of `USER:PASSWORD`, as HTTP wants it."""


def parse_credentials(data: bytes, name: str) -> Credentials:
    """Read `USER:PASSWORD`, one line.

    :param name: of the file, for messages; its content is in none.
    :raises ConfigError: it is something else.
    """
    line = data.removesuffix(b"\n").removesuffix(b"\r")
    user, separator, _ = line.partition(b":")
    is_printable = all(byte >= 0x20 and byte != 0x7F for byte in line)
    if not separator or not user or not is_printable or len(line) > CREDENTIALS_BYTES_MAX:
        raise ConfigError(
            f"{name} does not hold one line USER:PASSWORD", hint="write it, with mode 0600"
        )
    return Credentials(base64.b64encode(line).decode("ascii"))


def connect_request(target: str, credentials: Credentials | None) -> bytes:
    """Ask for a connection to `HOST:PORT`."""
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if credentials is not None:
        lines.append(f"Proxy-Authorization: Basic {credentials.value}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


@dataclass(frozen=True)
class ProxyAnswer:
    """What a proxy said."""

    status: int
    schemes: tuple[str, ...] = ()
    """Ways of proving oneself that it offers, like "basic"; of a 407."""

    @property
    def is_connected(self) -> bool:
        """Whether the bytes are the target's from here on."""
        return 200 <= self.status < 300

    def check(self, proxy: str, target: str) -> None:
        """:raises LinkError: it did not connect us; in words."""
        if self.is_connected:
            return
        if self.status == 407:
            offered = ", ".join(self.schemes) or "no way of doing so"
            raise LinkError(
                f"the proxy {proxy} wants a user name and a password (407; it offers {offered})",
                hint="put USER:PASSWORD into a file of mode 0600, name it in the configuration as "
                '"links.proxy_credentials"',
            )
        if self.status in (502, 503, 504):
            raise LinkError(f"the proxy {proxy} cannot reach {target} itself ({self.status})")
        raise LinkError(
            f"the proxy {proxy} refuses a connection to {target} ({self.status})",
            hint="many proxies let out port 443 only: let the peer listen there",
        )


class ConnectAnswer:
    """Reads a proxy's answer."""

    def __init__(self) -> None:
        self._reader = HeadReader()

    def receive(self, data: bytes) -> ProxyAnswer | None:
        """Take bytes; the answer as soon as it is whole.

        :raises RemoteProtocolError: it is no answer, too long, or followed by bytes that the target
            cannot have sent.
        """
        head = self._reader.receive(data)
        if head is None:
            return None
        answer = ProxyAnswer(head.status(), _schemes(head))
        if answer.status < 200:
            raise RemoteProtocolError(f"the proxy answers {answer.status} to CONNECT")
        if answer.is_connected and self._reader.rest:
            raise RemoteProtocolError("the proxy sends bytes of its own behind its answer")
        return answer


def _schemes(head: Head) -> tuple[str, ...]:
    found = [_SCHEME.match(value) for value in head.values("proxy-authenticate")]
    return tuple(dict.fromkeys(match.group().lower() for match in found if match))
