"""
TLS contexts for our listeners and dialers, and the chain a peer presented.

Source: SEC-17 (no resumption), transport (server TLS).  Keys reach OpenSSL through a memory
file: `load_cert_chain` wants a path, and a key must not touch a disk for it.
"""

import os
import ssl
from collections.abc import Sequence
from typing import Any, Final

from spiffe_core.pem import certificates_to_pem, private_key_to_pem

ALPN: Final = ["h2"]
_DER: Final = 2  # _ssl.ENCODING_DER


def server_context(
    chain: Sequence[bytes], key: bytes, authorities: Sequence[bytes]
) -> ssl.SSLContext:
    """
    Return a context that asks for a client certificate and verifies one that is sent.

    *chain* is DER, leaf first; *key* its PKCS#8 DER; *authorities* the CA certificates of
    our own trust domain, and of no other (T-09).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    harden(context, authorities)
    context.set_alpn_protocols(ALPN)
    context.verify_mode = ssl.CERT_OPTIONAL
    load(context, chain, key)
    return context


def client_context(
    authorities: Sequence[bytes], chain: Sequence[bytes] = (), key: bytes = b""
) -> ssl.SSLContext:
    """
    Return a context that demands a server certificate under *authorities*.

    The host name is not looked at; the caller compares the SPIFFE ID before it forwards a
    byte.  *chain* and *key* are sent when the server asks.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    harden(context, authorities)
    context.set_alpn_protocols(ALPN)
    if chain:
        load(context, chain, key)
    return context


def harden(context: ssl.SSLContext, authorities: Sequence[bytes] = ()) -> None:
    """Make *context*, fresh from `ssl`, what SEC-17 asks; without *authorities* none passes."""
    if context.protocol is ssl.PROTOCOL_TLS_CLIENT:
        context.check_hostname = False
    else:
        # A resumed session presents no certificate and outlives the one it was made with.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    # An anchor need not be self-signed (SPIRE API 1.1).
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if authorities:
        context.load_verify_locations(cadata=certificates_to_pem(authorities))


def load(context: ssl.SSLContext, chain: Sequence[bytes], key: bytes) -> None:
    """Load certificate and key into *context* without a file on a disk."""
    load_pem(context, (private_key_to_pem(key) + certificates_to_pem(chain)).encode())


def load_pem(context: ssl.SSLContext, pem: bytes) -> None:
    """Load what is PEM already: the key, and the chain with the leaf first."""
    memory = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        os.write(memory, pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)


def peer_chain(connection: Any) -> tuple[bytes, ...]:
    """Return the DER chain that the peer presented, leaf first; empty if it sent none."""
    inner = getattr(connection, "_sslobj", connection)
    # Without a client certificate CPython's answer is a list that holds None.
    return tuple(one.public_bytes(_DER) for one in inner.get_unverified_chain() or () if one)
