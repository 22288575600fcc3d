"""The way out of a network that lets connections out by an HTTP proxy alone.

The proxy is asked for a tunnel (CONNECT) and passes bytes on: TLS is between device and server, so
the pin of the certificate holds, and the proxy sees the server's name and how much is sent.
"""

from __future__ import annotations

from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from potluck.core import ConfigError
from potluck.protocol.routes import is_loopback


def proxy_of(url: str, given: str | None = None) -> str | None:
    """The proxy to an address: the one that is given, or that of the environment.

    `HTTPS_PROXY`, else `ALL_PROXY`, where `NO_PROXY` does not exempt the address; none to this
    machine itself.

    Raises:
        ConfigError: one that is not spoken to in plain HTTP. A TLS connection inside another one
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
