"""A server's descriptors: nobody who opens many connections locks out others, or the operator."""

from __future__ import annotations

import resource
import socket
import ssl
import subprocess
import sys
import time
from contextlib import ExitStack

import httpx
import pytest

from potluck.protocol import Accepted, Assignment
from potluck.server.http.listening import MOST_DESCRIPTORS, Listener
from remote import Caller
from serve_process import ServerProcess, experiment

BODY = 4 * 650  # bytes of an update of the model for digits


@pytest.fixture
def listener():
    with Listener(socket.create_server(("127.0.0.1", 0)), 8) as made:
        yield made


class Crowd:
    """Connections from addresses of this machine, and what the server's side has of them."""

    def __init__(self, listener, stack):
        self._listener, self._stack = listener, stack

    def come(self, address, count=1):
        """So many connections, accepted one after another."""
        return [self._come(address) for _ in range(count)]

    def _come(self, address):
        place = self._listener.getsockname()
        ours = self._stack.enter_context(socket.create_connection(place, 10, (address, 0)))
        accepted = self._listener.admit(*self._listener.accept())
        self._stack.enter_context(accepted)
        return ours, accepted

    @staticmethod
    def open(connections):
        """Which of them the server has not given up."""
        told = []
        for ours, _ in connections:
            ours.settimeout(0)
            try:
                told.append(ours.recv(1) != b"")
            except BlockingIOError:
                told.append(True)
        return told


@pytest.fixture
def crowd(listener):
    with ExitStack() as stack:
        yield Crowd(listener, stack)


def test_an_address_with_many_connections_loses_its_own_oldest(crowd):
    few = crowd.come("127.0.0.2", 2)
    many = crowd.come("127.0.0.3", 12)
    more = crowd.come("127.0.0.4")
    assert crowd.open(few) == [True] * 2
    assert crowd.open(more) == [True]
    assert crowd.open(many) == [False] * 9 + [True] * 3


def test_strangers_take_three_quarters_though_there_is_room(crowd):
    many = crowd.come("127.0.0.3", 8)
    assert crowd.open(many) == [False] * 2 + [True] * 6


def test_who_has_proven_to_be_a_device_stays_where_strangers_come(crowd):
    devices = crowd.come("127.0.0.1", 5)
    for number, (_, accepted) in enumerate(devices):
        accepted.prove(f"device {number}")
    strangers = [crowd.come(f"127.0.0.{n}")[0] for n in range(2, 10)]
    assert crowd.open(devices) == [True] * 5
    assert (
        crowd.open(strangers) == [False] * 5 + [True] * 3
    )  # the newest may still prove themselves


def test_a_device_with_many_connections_loses_the_one_it_used_longest_ago(crowd):
    many = crowd.come("127.0.0.1", 6)
    for _, accepted in many:
        accepted.prove("device")
    many[0][1].prove("device")  # one more request
    few = crowd.come("127.0.0.2", 3)
    assert crowd.open(few) == [True] * 3
    assert crowd.open(many) == [True, False, True, True, True, True]


def test_a_device_has_at_most_32_connections():
    with Listener(socket.create_server(("127.0.0.1", 0)), 100) as listener, ExitStack() as stack:
        crowd = Crowd(listener, stack)
        many = []
        for _ in range(34):
            many += crowd.come("127.0.0.1")
            many[-1][1].prove("device")
        assert crowd.open(many) == [False] * 2 + [True] * 32


def test_what_is_closed_counts_no_more(crowd, listener):
    for _ in range(3):
        for ours, accepted in crowd.come("127.0.0.2", 6):
            ours.close()
            accepted.close()
    left = crowd.come("127.0.0.2", 6)
    assert crowd.open(left) == [True] * 6


def test_half_an_ipv6_address_is_one_customers():
    from potluck.server.http.listening import _network

    assert _network(("2001:db8:1:2:3::4", 1, 0, 0)) == _network(("2001:db8:1:2:9::5", 1, 0, 0))
    assert _network(("2001:db8:1:2::", 1, 0, 0)) != _network(("2001:db8:1:3::", 1, 0, 0))
    assert _network(("::ffff:10.0.0.1", 1, 0, 0)) == _network(("10.0.0.1", 1)) == "10.0.0.1"
    assert _network(("fe80::1%eth0", 1, 0, 2)) == "fe80::"


def test_silent_sockets_at_the_limit_lock_out_neither_devices_nor_operator(tmp_path):
    crowd_out(tmp_path, descriptors=256, sockets=600)


@pytest.mark.soak
def test_twelve_hundred_silent_sockets_at_the_usual_limit_lock_nobody_out(tmp_path):
    crowd_out(tmp_path, descriptors=1024, sockets=1200)


def crowd_out(folder, descriptors, sockets):
    """A round of two devices and an operator's questions, beside silent sockets."""
    server = ServerProcess(folder, experiment(clients=2), limit=f"-n {descriptors}")
    with ExitStack() as stack:
        stack.callback(server.end)
        assert server.serves()
        devices = [Caller(server.address, server.certificate) for _ in range(2)]
        for device in devices:
            stack.callback(device.close)
        devices[0].enrol(server.invite())
        started = time.monotonic()
        for number in range(sockets):
            ours = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 30))
            if number % 3 == 0:  # in the middle of a record of TLS
                ours.sendall(b"\x16\x03\x01\x02\x00\x01")
        devices[1].enrol(server.invite())
        for device in devices:
            given = device.check_in()
            while not isinstance(given, Assignment):
                given = device.check_in()
            upload = device.report(given, bytes(BODY))
            assert isinstance(device.put(upload.upload, 0, bytes(BODY)), Accepted)
        while server.status()["round"] < 1:
            time.sleep(0.05)
        look_at_dashboard(server)
        for _ in range(40):  # what is no HTTP, and what has no signature
            for request in (b"X\r\n\r\n", b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\n\r\n"):
                told_off(server, request)
        while _told_of_strangers(server) <= 40:  # how many were left out stands in the next line
            told_off(server, b"X\r\n\r\n")
        seconds = time.monotonic() - started
    told = [line for line in server.log() if line["event"] == "connections"]
    assert 1 <= len(told) <= seconds + 2
    strangers = (descriptors - min(256, descriptors // 4)) * 3 // 4
    assert f"at most {strangers} before their first request" in told[0]["reason"]
    others = [line for line in server.log() if line["level"] in ("warning", "error")]
    assert [line for line in others if line["logger"] != "uvicorn.error"] == told
    strangers = [line for line in server.log() if line["event"][:7] in ("request", "Invalid")]
    assert 1 <= len(strangers) <= seconds + 2


def _told_of_strangers(server):
    lines = [line for line in server.log() if line["event"][:7] in ("request", "Invalid")]
    return len(lines) + sum(line.get("left_out", 0) for line in lines)


def told_off(server, request):
    context = ssl.create_default_context(cadata=server.certificate)
    context.check_hostname = False
    with (
        socket.create_connection(("127.0.0.1", server.port), 30) as plain,
        context.wrap_socket(plain) as secure,
    ):
        secure.sendall(request)
        assert b" 40" in secure.recv(65_536)


def look_at_dashboard(server):
    context = ssl.create_default_context(cadata=server.certificate)
    context.check_hostname = False
    with httpx.Client(base_url=server.address, verify=context) as browser:
        key = server.operator.post("dashboard")["link"].partition("#")[2]
        assert browser.get("/health").status_code == 200
        assert browser.post("/dashboard/sign-in", data={"key": key}).status_code == 303
        assert b"served" in browser.get("/dashboard").content


def test_the_soft_limit_is_raised_at_the_start():
    program = (
        "from potluck.server.http.listening import raise_descriptors; print(raise_descriptors())"
    )
    command = ["sh", "-c", 'ulimit -Sn 128 && exec "$@"', "sh", sys.executable, "-c", program]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    unlimited = hard == resource.RLIM_INFINITY
    assert int(told.stdout) == MOST_DESCRIPTORS if unlimited else min(hard, MOST_DESCRIPTORS)
