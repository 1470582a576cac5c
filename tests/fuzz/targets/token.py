"""Join tokens as an operator pastes them: a TokenError, or a token whose text is the same again."""

from __future__ import annotations

import base64
import hashlib

from geomirror.environment import SECOND
from geomirror.errors import TokenError
from geomirror.limits import PRODUCTION
from geomirror.tunnel.token import PREFIX, Secret, Token, parse_token
from tests.fuzz.source import Source


def seeds() -> list[bytes]:
    """A good token as text, and its body, whose check `run` makes right."""
    texts = [
        Token("acme", bytes(32), endpoints, "0123456789abcdef", Secret(bytes(32)), 9 * SECOND)
        for endpoints in (("203.0.113.7:7701",), ("[2001:db8::1]:7701", "host.example:1"))
    ]
    found = []
    for token in texts:
        text = token.to_text()
        encoded = text.removeprefix(PREFIX)
        body = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))[4:]
        found += [b"\0" + text.encode(), b"\0 " + text.encode() + b"\n", b"\1" + body]
    return found


def _parse(text: str) -> Token | str:
    try:
        return parse_token(text, PRODUCTION)
    except TokenError as error:
        return str(error)


def run(data: bytes) -> None:
    """Any text, or any body with a right check."""
    source = Source(data)
    if source.flag():
        body = source.rest()
        check = hashlib.sha256(b"geomirror token v1\0" + body).digest()[:4]
        text = PREFIX + base64.urlsafe_b64encode(check + body).rstrip(b"=").decode()
    else:
        text = source.rest().decode("utf-8", "surrogateescape")
    token = _parse(text)
    if isinstance(token, str):
        assert len(text) < 16 or text[4:] not in token, "the message repeats the token"
        return
    secret = token.secret.reveal()
    assert secret.hex() not in repr(token)
    again = parse_token(token.to_text(), PRODUCTION)
    assert again.secret.reveal() == secret
    assert (again.network, again.authority_hash, again.endpoints, again.token_id) == (
        token.network,
        token.authority_hash,
        token.endpoints,
        token.token_id,
    )
    assert again.expires_ns == token.expires_ns
