"""TLS contexts: 1.3 only, our authority only, no resumption.

OpenSSL checks signature, chain, key usage and the network name constraint of every certificate.
Dates are left to `certificates.check_dates`, which uses the injected clock and explains itself.
Without session tickets each connection proves its key anew, so a revocation cannot be resumed past.
"""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
from collections.abc import Callable

from cryptography import x509
from cryptography.x509.oid import NameOID

from geomirror.environment import Entropy
from geomirror.errors import AuthError, GeomirrorError, IntegrityError, LinkError
from geomirror.tunnel.authority import certificate_pem
from geomirror.tunnel.driver import CIRCUIT_PROTOCOL, JOIN_PROTOCOL, LINK_PROTOCOL
from geomirror.tunnel.identity import key_to_pem, new_key
from geomirror.tunnel.network_state_io import NetworkState

_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; Python has no name for it."""

_OTHER_NETWORK = ("UNKNOWN_CA", "CERTIFICATE_VERIFY_FAILED")
_OUR_CERTIFICATE = ("CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "ACCESS_DENIED", "DECRYPT_ERROR")


def network_label(authority_hash: bytes) -> str:
    """The server name that a client asks for: known to members and token holders only.

    A server shows its certificate, and with it the names of network and node, to nobody else.
    """
    return f"{authority_hash[:16].hex()}.geomirror.internal"


def server_context(state: NetworkState, entropy: Entropy) -> ssl.SSLContext:
    """For accepting links and join exchanges; a client's certificate is checked if it shows one."""
    label = network_label(state.authority_hash)
    context = _base(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols([LINK_PROTOCOL, CIRCUIT_PROTOCOL, JOIN_PROTOCOL])
    context.num_tickets = 0
    context.sni_callback = _require_label(label, _decoy_context(state, entropy))
    _trust(context, state)
    return context


def client_context(state: NetworkState, protocol: str) -> ssl.SSLContext:
    """For dialling connections of this ALPN."""
    context = _base(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the URI name is checked by the driver
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([protocol])
    _trust(context, state)
    return context


def joiner_context() -> ssl.SSLContext:
    """For a joiner, who trusts nobody yet: `Joiner.receive_hello` judges the server."""
    return stranger_context(JOIN_PROTOCOL)


def stranger_context(protocol: str) -> ssl.SSLContext:
    """For one who shows no certificate, and judges the server's himself."""
    context = _base(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    return context


def load_own(context: ssl.SSLContext, state: NetworkState) -> None:
    """Use our certificate and key from now on; connections that exist are not touched.

    :raises IntegrityError: the files cannot be used.
    """
    try:
        context.load_cert_chain(state.certificate_path, state.key_path)
    except (ssl.SSLError, OSError) as error:
        path = state.certificate_path
        raise IntegrityError(f"{path} cannot be used: {error}", hint="restore it") from None


def explain(error: OSError, who: str) -> GeomirrorError:
    """Turn a failure of connecting or of a handshake into ours.

    :param who: like `"west-1" at 203.0.113.7:7701`.
    """
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    if reason and any(word in reason for word in _OTHER_NETWORK):
        return AuthError(
            f"{who} is not of this network: its certificate is signed by another authority",
            hint='check the endpoint with "geomirror node list"',
        )
    if reason and any(word in reason for word in _OUR_CERTIFICATE):
        return AuthError(f"{who} does not accept this node's certificate ({reason})")
    if isinstance(error, ssl.SSLError):
        return LinkError(
            f"{who} does not speak TLS 1.3 with us ({reason or error})",
            hint="is another program, or a firewall that inspects TLS, behind that address?",
        )
    cause = error.strerror or str(error) or "the connection was closed"
    return LinkError(f"{who} cannot be reached: {cause}")


def _base(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.verify_flags |= ssl.VERIFY_X509_STRICT | _NO_CHECK_TIME
    return context


def _trust(context: ssl.SSLContext, state: NetworkState) -> None:
    context.load_verify_locations(cadata=certificate_pem(state.authority_certificate))
    load_own(context, state)


Choose = Callable[[ssl.SSLObject, str | None, ssl.SSLContext], None]


def _decoy_context(state: NetworkState, entropy: Entropy) -> ssl.SSLContext:
    """What strangers get: a certificate of nobody, and none of our protocols.

    An alert would be more to the point, but event loops drop it when a handshake fails; so a node
    of another network could not tell us from a broken one.
    """
    key = new_key(entropy)
    nobody = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nobody")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(nobody)
        .issuer_name(nobody)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
    )
    pem = key_to_pem(key) + certificate_pem(builder.sign(key, None)).encode("ascii")
    context = _base(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    # OpenSSL reads key and certificate from files only. In memory where there is such a thing: a
    # node has to start on a full disk, too.
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("decoy"), "wb") as file:
            file.write(pem)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context
    with tempfile.NamedTemporaryFile(dir=state.key_path.parent, prefix=".decoy.") as named:
        named.write(pem)
        named.flush()
        context.load_cert_chain(named.name)
    return context


def _require_label(label: str, decoy: ssl.SSLContext) -> Choose:
    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name != label:
            connection.context = decoy

    return choose
