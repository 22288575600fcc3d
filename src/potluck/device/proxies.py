"""Proxies in the environment, which a device does not use: it connects to its server directly.

The server's certificate is pinned on the very connection that is made, and a device needs one
address and one port. A network that lets connections out by a proxy alone cannot be used.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass


def unused_proxy(url: str) -> str | None:
    """The variable that names a proxy for this address, if `NO_PROXY` does not exempt it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    found = getproxies_environment()
    if not host or proxy_bypass(host):
        return None
    for scheme in (parts.scheme.lower(), "all"):
        if scheme in found:
            names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
            return next((name for name in names if os.environ.get(name)), names[1])
    return None
