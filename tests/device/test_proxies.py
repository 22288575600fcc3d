"""Devices in a network that lets connections out by an HTTP proxy alone."""

from __future__ import annotations

import base64
import os
import select
import socket
import socketserver
import threading

import pytest

from federation import Device, Federation, UnitTrainer
from potluck.core import ConfigError
from potluck.device.clock import Stopped
from potluck.device.transport import proxy_of
from remote import Served
from swarm import until


class Tunnel(socketserver.BaseRequestHandler):
    """CONNECT alone, to those who know the password; every byte is kept."""

    def handle(self):
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(4096)
        words = head.split(b"\r\n")[0].decode().split()
        if self.server.asked(words) and self.server.word not in head:
            self.request.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        there = socket.create_connection(("127.0.0.1", self.server.to or int(words[1][-5:])))
        self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with there:
            pass_on(self.request, there, self.server.seen)


def pass_on(one, other, seen=None):
    """Hand bytes on both ways until either side has done."""
    while True:
        ready = getattr(one, "pending", int)() and [one]
        for source in ready or select.select([one, other], [], [])[0]:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            if not data:
                return
            if seen is not None:
                seen.append(data)
            (other if source is one else one).sendall(data)


class Proxy(socketserver.ThreadingTCPServer):
    """A proxy on loopback until the end of the block; `to`: it leads to this port instead."""

    daemon_threads = True

    def __init__(self, to=0):
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.seen, self.requests, self.to = [], [], to
        self.word = b"Proxy-Authorization: Basic " + base64.b64encode(b"me:secret")
        threading.Thread(target=self.serve_forever, args=(0.05,)).start()

    def asked(self, words):
        self.requests.append(words[:2])
        return True

    @property
    def url(self):
        return f"http://me:secret@127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def test_a_device_takes_part_through_a_proxy_that_sees_nothing(tmp_path):
    with Federation(tmp_path, clients=1, rounds=2) as federation, Proxy() as proxy:
        device = federation.join(0, UnitTrainer(), proxy=proxy.url)
        federation.until(lambda: federation.status()["state"] == "finished" or device.died)
        device.end()
        authority = federation.server.address.removeprefix("https://")
        assert {tuple(one) for one in proxy.requests} == {("CONNECT", authority)}
        seen = b"".join(proxy.seen)
        assert (device.count("accepted"), device.died) == (2, None)
        assert not any(word in seen for word in (b"/v1/", b"otluck"))


def test_a_proxy_that_leads_elsewhere_is_found_out(tmp_path):
    (tmp_path / "other").mkdir()
    with (
        Served(tmp_path, count=1) as served,
        Served(tmp_path / "other") as other,
        Proxy(to=other.port) as proxy,
    ):
        folder, options = tmp_path / "d", {"proxy": proxy.url}
        device = Device(served.server.address, served.invite(), folder, UnitTrainer(), **options)
        until(lambda: device.died or len(proxy.requests) > 2)
        device.clock.stop()
        device.end()
    assert "certificate" in str(device.died) or isinstance(device.died, Stopped)
    assert not (folder / "enrolment.json").exists()


@pytest.mark.parametrize(
    ("variables", "url", "found"),
    [
        ({}, "https://a.example:8443", None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "https://a.example:8443", "http://proxy:3128"),
        ({"https_proxy": "proxy:3128"}, "HTTPS://A.example", "http://proxy:3128"),
        ({"ALL_PROXY": "http://proxy"}, "https://a.example", "http://proxy"),
        ({"HTTP_PROXY": "http://proxy"}, "https://a.example", None),
        ({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "a.example"}, "https://a.example:1", None),
        ({"HTTPS_PROXY": "http://proxy", "no_proxy": "*"}, "https://a.example", None),
        ({"HTTPS_PROXY": "http://proxy"}, "https://127.0.0.1:8443", None),
        ({"HTTPS_PROXY": "http://proxy"}, "https://[::1]:8443", None),
        ({"HTTPS_PROXY": "http://proxy"}, "nonsense", None),
    ],
)
def test_the_environment_names_the_proxy(monkeypatch, variables, url, found):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_of(url) == found
    assert proxy_of(url, "http://mine:1") == "http://mine:1"


@pytest.mark.parametrize(
    "proxy", ["socks5://me:secret@proxy:1080", "https://me:secret@proxy", "http://"]
)
def test_a_proxy_of_another_kind_is_refused_without_its_password(proxy):
    with pytest.raises(ConfigError, match="must be an HTTP proxy") as told:
        proxy_of("https://a.example", proxy)
    assert "secret" not in str(told.value)
