"""Listening sockets whose connections are limited, so that descriptors never run out.

A connection counts for its address until a request on it proves whose it is; from then on for that
device or session. At the limit, of all or of unproven connections, one is closed. It belongs to the
address, device or session that has most, and is the one that has proven nothing for longest. So a
client that opens many loses its own, and a new connection has time to prove whose it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext
from typing import Any, NamedTuple

from starlette.types import Scope

from potluck.core import RunError

HANDSHAKE_SECONDS = 15.0
"""The time for the handshake of TLS, from accept on."""
_BACKLOG = 4096
"""Connections that wait to be accepted. Without room there is no answer: the client's system tries
again after 1, 2 and 4 seconds, and thousands do so together."""
OPERATORS = 32
"""Connections at once at the operators' socket, which only the server's own user can open."""
MOST_DESCRIPTORS = 65_536
"""The most descriptors that are of use to one process."""
_STRANGERS = 4_096
"""Connections that have proven nothing: in a handshake each takes 70 KB."""
_OF_ONE = 32
"""Connections of a device or session. It needs one; a proxy between may keep more for it."""
_RESERVED = 256
"""Descriptors for database, blobs and operators."""
_ACCEPTS = 128
"""Connections that are accepted at once, before handshakes go on, which cost four times as much."""
_GIVEN_UP_RATE = 400.0
"""Connections a second that are closed for new ones. Clients that connect again at once get a third
of a core. A new client waits ten seconds behind as many as the system keeps."""
_SCARCE_SECONDS = 0.05
_LOG_SECONDS = 1.0
_LOG = logging.getLogger("potluck.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """The address for devices, and the certificate; None: one of our own."""

    host: str = "127.0.0.1"
    port: int = 8443
    plaintext: bool = False
    certificate: Path | None = None
    private_key: Path | None = None
    names: tuple[str, ...] = ()
    """Further names of the server, beside its address and those on its certificate."""


def open_listener(listen: Listen) -> Listener:
    """Opens the socket for devices.

    Raises:
        RunError: the address is taken, or not ours.
    """
    try:
        family = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0][0]
        is_both = listen.host == "::" and socket.has_dualstack_ipv6()  # IPv4 comes there too
        made = socket.create_server(
            (listen.host, listen.port), family=family, backlog=_BACKLOG, dualstack_ipv6=is_both
        )
        # Connections inherit it. asyncio sets it where a socket says that it is TCP, which these do
        # not; and an answer in two pieces would wait 40 ms for the other side's acknowledgement.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise RunError(
            f"the address must be free and ours, got {_reason(error)!r} for "
            f"{authority(listen.host, listen.port)}. Choose another --port or --host."
        ) from None
    descriptors = raise_descriptors()
    return Listener(made, descriptors - min(_RESERVED, descriptors // 4))


def listen_unix(path: Path) -> Listener:
    """Opens the socket for operators.

    Raises:
        RunError: the path is too long.
    """
    path.unlink(missing_ok=True)  # of an earlier process: this one holds the folder's lock
    made = socket.socket(socket.AF_UNIX)
    old = os.umask(0o177)
    try:
        made.bind(str(path))
    except OSError as error:
        made.close()
        raise RunError(
            f"the admin socket must be at a path of at most about 100 bytes, got {str(path)!r} "
            f"({error}). Name another --home."
        ) from None
    finally:
        os.umask(old)
    made.listen(16)
    return Listener(made, OPERATORS)


def authority(host: str, port: int) -> str:
    """Returns host and port as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def raise_descriptors() -> int:
    """Raises the soft limit on open descriptors as far as is permitted and of use. Returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _of_use(hard)
    if _of_use(soft) < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return _of_use(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _of_use(limit: int) -> int:
    return MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit, MOST_DESCRIPTORS)


class _Owner(NamedTuple):
    """The owner of a connection: a proven device or session, or an address."""

    is_address: bool
    name: str


class ClientSocket(socket.socket):
    """A connection that counts until it is closed."""

    def __init__(self, listener: Listener, made: socket.socket, owner: _Owner) -> None:
        super().__init__(made.family, made.type, made.proto, fileno=made.detach())
        self._listener = listener
        self.owner = owner
        self.transport: Any = None
        """asyncio's, that reads from here; None until there is one that is known."""

    def give_up(self) -> None:
        """Closes the connection, whatever its state."""
        if self.transport is not None:
            self.transport.abort()
        with contextlib.suppress(OSError):  # in the handshake, asyncio reads and sees the end
            self.shutdown(socket.SHUT_RDWR)

    def prove(self, name: str) -> None:
        """Notes that a request has proven the connection's owner."""
        self._listener.change(self, _Owner(False, name))

    def close(self) -> None:
        """Closes the connection, which counts no more."""
        self.transport = None
        self._listener.forget(self)
        super().close()


class Listener(socket.socket):
    """A listening socket of at most `limit` connections. Belongs to one event loop."""

    def __init__(self, bound: socket.socket, limit: int) -> None:
        super().__init__(fileno=bound.detach())
        self.limit = limit
        self._most_strangers = min(limit * 3 // 4, _STRANGERS)
        self._open: dict[int, ClientSocket] = {}  # by descriptor, also those that are given up
        self._owned: dict[
            _Owner, dict[ClientSocket, None]
        ] = {}  # what has proven least recently first
        self._by_rank: dict[int, dict[_Owner, None]] = {}
        self._count = {True: 0, False: 0}  # not given up: of addresses, of others
        self._given_up = 0
        self._logged, self._logged_count = -_LOG_SECONDS, 0  # when it was, and of how many

    async def serve(self, make: Callable[[], asyncio.Protocol], tls: SSLContext | None) -> None:
        """Accepts connections, each for a new protocol, until the task is cancelled."""
        loop = asyncio.get_running_loop()
        self.setblocking(False)
        beginning: set[asyncio.Task[None]] = set()
        num_accepted = 0
        while True:
            given_up = self._given_up
            try:
                accepted = self.admit(*await loop.sock_accept(self))
            except OSError as error:  # of descriptors or memory, say, which others use
                if self._by_rank:
                    self._give_up(self._worst(), str(error))
                await asyncio.sleep(_SCARCE_SECONDS)
                continue
            task = loop.create_task(_begin(accepted, make, tls))
            beginning.add(task)
            task.add_done_callback(beginning.discard)
            num_accepted += 1
            if self._given_up > given_up:
                await asyncio.sleep(1.0 / _GIVEN_UP_RATE)
            elif num_accepted % _ACCEPTS == 0:
                await asyncio.sleep(0)

    def admit(self, made: socket.socket, address: Any) -> ClientSocket:
        """Counts one more connection, and gives another up where there are many."""
        accepted = ClientSocket(self, made, _Owner(True, _network(address)))
        self._open[accepted.fileno()] = accepted
        self._put(accepted)
        if self._count[True] > self._most_strangers:
            self._give_up(
                self._worst(is_address=True), f"{self._most_strangers} before their first request"
            )
        elif sum(self._count.values()) > self.limit:
            self._give_up(self._worst(), f"{self.limit}")
        return accepted

    def find(self, descriptor: int) -> ClientSocket | None:
        """Returns the open connection of this descriptor."""
        return self._open.get(descriptor)

    def change(self, accepted: ClientSocket, owner: _Owner) -> None:
        """Counts the connection for this owner from now on, as the latest that has proven it."""
        if self._take(accepted):
            accepted.owner = owner
            self._put(accepted)
            if len(self._owned[owner]) > _OF_ONE:
                self._give_up(owner, f"{_OF_ONE} of one device or session")

    def forget(self, accepted: ClientSocket) -> None:
        """Stops counting a connection that is about to be closed."""
        self._take(accepted)
        self._open.pop(accepted.fileno(), None)

    def _worst(self, *, is_address: bool = False) -> _Owner:
        """Returns the owner whose connection is closed first, of all or of the addresses."""
        rank = max(rank for rank in self._by_rank if rank % 2 >= is_address)
        return next(iter(self._by_rank[rank]))

    def _give_up(self, owner: _Owner, limit: str) -> None:
        """Closes an owner's oldest connection, and logs that at most once a second."""
        victim = next(iter(self._owned[owner]))
        self._take(victim)
        victim.give_up()
        self._given_up += 1
        now = time.monotonic()
        if now - self._logged >= _LOG_SECONDS:
            kind = "address" if owner.is_address else "device or session"
            count = self._given_up - self._logged_count
            told = f"at most {limit}, got more: {count} were closed since the last such line, "
            told += f"the last one of the {kind} {owner.name}. See docs/operating.md."
            _LOG.warning("connections", extra={"reason": told})
            self._logged, self._logged_count = now, self._given_up

    def _put(self, accepted: ClientSocket) -> None:
        owned = self._owned.setdefault(accepted.owner, {})
        self._unrank(accepted.owner, len(owned))
        owned[accepted] = None
        self._by_rank.setdefault(_rank(accepted.owner, len(owned)), {})[accepted.owner] = None
        self._count[accepted.owner.is_address] += 1

    def _take(self, accepted: ClientSocket) -> bool:
        """Counts the connection no more; False: it was not counted."""
        owner = accepted.owner
        owned = self._owned.get(owner, {})
        if accepted not in owned:
            return False
        self._unrank(owner, len(owned))
        del owned[accepted]
        if owned:
            self._by_rank.setdefault(_rank(owner, len(owned)), {})[owner] = None
        else:
            del self._owned[owner]
        self._count[owner.is_address] -= 1
        return True

    def _unrank(self, owner: _Owner, num_owned: int) -> None:
        rank = _rank(owner, num_owned)
        alike = self._by_rank.get(rank, {})
        alike.pop(owner, None)
        if not alike:
            self._by_rank.pop(rank, None)


async def _begin(
    accepted: ClientSocket, make: Callable[[], asyncio.Protocol], tls: SSLContext | None
) -> None:
    loop = asyncio.get_running_loop()
    seconds = None if tls is None else HANDSHAKE_SECONDS
    try:
        await loop.connect_accepted_socket(make, accepted, ssl=tls, ssl_handshake_timeout=seconds)
    except OSError:  # of the handshake, which is tried again or was none
        accepted.close()


def prove(scope: Scope, name: str) -> None:
    """Notes that the request of this scope has proven its connection's owner."""
    accepted = scope.get("accepted")
    if accepted is not None:
        accepted.prove(name)


def _rank(owner: _Owner, num_owned: int) -> int:
    """Returns the rank of an owner: of the highest, a connection is closed first.

    That is the owner with most connections; of equals, one that has proven nothing.
    """
    return 2 * num_owned + owner.is_address


def _network(address: Any) -> str:
    """Returns an IPv4 address, or the half of an IPv6 address that belongs to one customer."""
    if not isinstance(address, tuple):
        return ""
    host = str(address[0])  # pyright: ignore[reportUnknownArgumentType]
    if ":" not in host:
        return host
    full = ipaddress.IPv6Address(host.partition("%")[0])
    return str(full.ipv4_mapped or ipaddress.IPv6Address(int(full) >> 64 << 64))


def _reason(error: OSError) -> str:
    """Returns the reason without Python's additions."""
    return (error.strerror or str(error)).partition(" (while")[0]
