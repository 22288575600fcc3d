"""The names of a server: the hosts that devices may have signed their requests for.

These are the names given to `potluck serve --name`, those on an operator's certificate, the
machine's name, the address that the connection came to, and loopback. Ports are not compared, since
tunnels, containers and proxies change them; a signature is bound to the run's key besides.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection, Iterable
from pathlib import Path

from potluck.core import ConfigError
from potluck.server.http.certificate import certificate_names

_PORT = re.compile(r":[0-9]{1,5}$")
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:]+:[0-9a-f:.]*")


def all_names(given: Iterable[str], listens: str, certificate: Path | None) -> set[str]:
    """Returns the hosts of a server, apart from the addresses that connections come to.

    Raises:
        ConfigError: a name that is none.
    """
    machine = socket.gethostname().lower()
    names = {host_of(name) for name in given} | {machine, f"{machine}.local", _host(listens)}
    return names | (set() if certificate is None else certificate_names(certificate))


def host_of(authority: str) -> str:
    """Returns the host in a HOST or HOST:PORT.

    Raises:
        ConfigError: it is none.
    """
    host = _host(authority.lower())
    try:
        host = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        host = ""
    if _NAME.fullmatch(host) is None:
        raise ConfigError(
            f"a server's name must look like potluck.example or potluck.example:8443, got "
            f"name={authority[:80]!r}. Leave out https:// and paths."
        )
    return host


def is_called(authority: str, local: str, names: Collection[str]) -> bool:
    """Returns whether an authority, in lower case, is that of a server with these names.

    Args:
        local: the address that the connection came to.
    """
    host = _host(authority).rstrip(".")
    if host in names or host == "localhost" or f"*.{host.partition('.')[2]}" in names:
        return True
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address == ipaddress.ip_address(local.removeprefix("::ffff:"))
    except ValueError:
        return False


def _host(authority: str) -> str:
    is_bare = authority.count(":") > 1 and not authority.startswith("[")  # IPv6, as one types it
    return authority if is_bare else _PORT.sub("", authority).removeprefix("[").removesuffix("]")
