"""The device's side of TLS: a server is trusted by the SHA-256 of its certificate, or as usual.

Guarantee: with a fingerprint no byte of a request leaves before the server has shown, in a TLS
handshake, that it holds the private key of exactly that certificate. Names, dates and authorities
do not matter then, so a clock that is wrong does not either.
"""

from __future__ import annotations

import hashlib
import ssl


def client_context(certificate: str | None) -> ssl.SSLContext:
    """What to connect with.

    Args:
        certificate: the SHA-256, in hex, of the certificate as DER; None: the certificate
            authorities of the system vouch for the server's name.
    """
    if certificate is None:
        context = ssl.create_default_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the handshake below is the check
        context.sslsocket_class = _pinned(certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _pinned(certificate: str) -> type[ssl.SSLSocket]:
    class PinnedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            shown = hashlib.sha256(self.getpeercert(binary_form=True) or b"").hexdigest()
            if shown != certificate:
                raise ssl.SSLCertVerificationError(
                    f"the server's certificate must have the SHA-256 {certificate} of the "
                    f"invitation, got {shown}. Somebody is in between, or the server has a new "
                    "one: ask for another invitation."
                )

    return PinnedSocket
