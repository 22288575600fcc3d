"""The way of a device to its server: TLS with a pinned certificate or as usual, and proxies.

With a fingerprint no byte of a request leaves before the server has shown, in a TLS handshake, that
it holds the private key of exactly that certificate. Names, dates and authorities do not matter
then, and neither does a wrong clock.

A proxy is asked for a tunnel (CONNECT) and passes bytes on. TLS is between device and server, so
the pin of the certificate holds, and the proxy sees the server's name and how much is sent.
"""

from __future__ import annotations

import hashlib
import ssl
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from potluck.core import ConfigError
from potluck.protocol.routes import is_loopback


def proxy_of(url: str, given: str | None = None) -> str | None:
    """Returns the proxy to an address: the given one, or that of the environment.

    `HTTPS_PROXY`, else `ALL_PROXY`, where `NO_PROXY` does not exempt the address; none to this
    machine itself.

    Raises:
        ConfigError: a proxy that does not take plain HTTP. A TLS connection inside another one
            would not be that of which the certificate is compared.
    """
    parts = urlsplit(url)
    host, scheme = parts.hostname or "", parts.scheme.lower()
    if given is None and (not host or is_loopback(host) or proxy_bypass(host)):
        return None
    named = getproxies_environment()
    proxy = given or named.get(scheme) or named.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    found = urlsplit(proxy)
    if found.scheme.lower() != "http" or not found.hostname:
        shown = f"{found.scheme}://{found.hostname or ''}"  # without its password
        raise ConfigError(
            f"a proxy must be an HTTP proxy, http://host:port, got {shown!r} for {host}. "
            "Name one with --proxy or HTTPS_PROXY, or exempt the server with NO_PROXY."
        )
    return proxy


def client_context(certificate: str | None) -> ssl.SSLContext:
    """Returns the TLS context of a connection.

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
