"""A proxy of plain HTTP/1.1 on loopback that loses answers, or cuts bodies and answers off.

It sees which request a connection carries by the head that a device sends in front of each body.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

_HEAD = re.compile(rb"(GET|POST|PUT) (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", re.DOTALL)


class Seen(NamedTuple):
    """A request on its way."""

    method: str
    path: str
    device: str
    digest: str  # of the body: the same when it is tried again


class FaultProxy:
    """Listens in a thread until the end of the block.

    Args:
        lose: whether to lose the answer to a request, and the connection with it.
        cut: after how many bytes of the body to break the connection; None: not at all.
        cut_answer: the same of the answer, its head included.
    """

    def __init__(
        self,
        port: int,
        *,
        lose: Callable[[Seen], bool] = lambda seen: False,
        cut: Callable[[Seen], int | None] = lambda seen: None,
        cut_answer: Callable[[Seen], int | None] = lambda seen: None,
    ) -> None:
        self._port = port
        self._lose = lose
        self._cut = cut
        self._cut_answer = cut_answer
        self.answered: Counter[str] = Counter()
        """The bytes of the answers that passed, by path."""
        self.lost: dict[Seen, bytes] = {}
        """The answers that were lost, whole; and what passed when their requests came again."""
        self.again: dict[Seen, bytes] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> FaultProxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            _close(connection)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._open |= {client, server}
            thread = threading.Thread(target=self._serve, args=(client, server))
            thread.start()
            self._threads.append(thread)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        current: list[Seen] = []
        back = threading.Thread(target=self._answer, args=(client, server, current))
        back.start()
        room: int | None = None  # what may still pass of this body
        with contextlib.suppress(OSError):
            while data := client.recv(65_536):
                head = _HEAD.match(data)
                if head is not None:
                    current[:] = [_read(head)]
                    cut = self._cut(current[0])
                    room = None if cut is None else cut + head.end()
                if room is not None:
                    server.sendall(data[:room])
                    room -= len(data)
                    if room <= 0:
                        break
                else:
                    server.sendall(data)
        _close(client)
        _close(server)
        back.join()
        self._open -= {client, server}

    def _answer(self, client: socket.socket, server: socket.socket, current: list[Seen]) -> None:
        with contextlib.suppress(OSError):
            request, room = None, None  # what may still pass of this answer
            while data := server.recv(65_536):
                if current[0] is not request:
                    request = current[0]
                    room = self._cut_answer(request)
                if self._lose(request):
                    self.lost[request] = _whole(data, server)
                    break
                if request in self.lost:
                    self.again[request] = self.again.get(request, b"") + data
                client.sendall(data if room is None else data[:room])
                self.answered[request.path] += len(data if room is None else data[:room])
                room = None if room is None else room - len(data)
                if room is not None and room <= 0:
                    break
        _close(client)
        _close(server)


def _read(head: re.Match[bytes]) -> Seen:
    headers = dict(line.lower().split(b": ", 1) for line in head[3].split(b"\r\n") if b": " in line)
    device, digest = (
        headers.get(b"potluck-" + name, b"").decode() for name in (b"device", b"digest")
    )
    return Seen(head[1].decode(), head[2].decode(), device, digest)


def _whole(answer: bytes, server: socket.socket) -> bytes:
    """An answer that has begun, to its end."""
    while True:
        head, _, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length is not None and len(body) >= int(length[1]):
            return answer
        more = server.recv(65_536)
        if not more:
            return answer
        answer += more


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
