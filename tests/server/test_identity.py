"""A signature is for one run at one server: what another server passes on is refused."""

from __future__ import annotations

import pytest

from federation import Federation, UnitTrainer
from intermediary import Intermediary
from potluck.core import ConfigError
from potluck.device import Home
from potluck.protocol import Enrolled, Error, encode_message, public_key
from potluck.server.http.authorities import all_names, host_of, is_called
from remote import Caller, Served, read


@pytest.fixture
def two(tmp_path):
    with Served(tmp_path / "right") as right, Served(tmp_path / "other") as other:
        yield right, other


def test_what_a_second_server_passes_on_is_refused(two):
    """A device that enrolled at two servers with one key signs for each alone."""
    right, other = two
    device = right.device()
    at_other = other.caller(key=device.key)
    assert isinstance(at_other.enrol(other.invite()), Enrolled)
    with Intermediary(right.port, other.home) as relay:
        # The device comes to the second server, which hands its requests to the first.
        certificate = other.home.certificate.read_text()
        relayed = Caller(relay.address, certificate, key=device.key, run_key=at_other.run_key)
        relayed.sequence = device.sequence
        relayed.invitation = at_other.invitation
        answer = relayed.check_in()
        assert isinstance(answer, Error), answer
        assert answer.code == "bad_signature"
        relayed.close()
    assert device.assigned().round == 1  # and its own request is as good as before


def test_a_newcomer_that_a_second_server_passes_on_is_not_enrolled(two):
    right, other = two
    with Intermediary(right.port, other.home) as relay:
        relayed = Caller(relay.address, other.home.certificate.read_text())
        invitation = other.invite()
        answer = relayed.enrol(invitation)
        assert isinstance(answer, Error), answer
        assert answer.code == "token"
        relayed.close()
    assert right.run.service.devices(right.run.id) == []


def test_what_was_signed_for_another_host_is_refused_by_the_runs_own_key(tmp_path):
    names = ("Potluck.example:9443",)
    with Served(tmp_path, names=names) as served:
        device = served.device()
        message = encode_message(device.check_in_of())
        codes = {}
        for host in ("evil.example", f"evil.example:{served.port}", "10.1.2.3:8443",
                     "potluck.example", "potluck.example:1", "POTLUCK.example:9443",
                     f"localhost:{served.port}", "[::1]:8443", "127.0.0.1"):  # fmt: skip
            signed = device.signed("POST", "/v1/check-in", message, authority=host.lower())
            headers = signed | {"Host": host}
            answer = read(device.send("POST", "/v1/check-in", message, headers=headers))
            codes[host] = getattr(answer, "code", None)
        refused = {host for host, code in codes.items() if code == "misdirected"}
        assert refused == {"evil.example", f"evil.example:{served.port}", "10.1.2.3:8443"}
        assert set(codes.values()) == {"misdirected", None}
        assert served.server.address == "https://Potluck.example:9443"


@pytest.mark.parametrize(
    ("authority", "local", "names", "is_ours"),
    [
        ("192.0.2.7:8443", "192.0.2.7", (), True),
        ("192.0.2.7:9000", "::ffff:192.0.2.7", (), True),
        ("192.0.2.8:8443", "192.0.2.7", (), False),
        ("[2001:db8:0::1]:8443", "2001:db8::1", (), True),
        ("[2001:db8::2]", "2001:db8::1", (), False),
        ("ward.hospital.example", "192.0.2.7", ("*.hospital.example",), True),
        ("a.ward.hospital.example", "192.0.2.7", ("*.hospital.example",), False),
        ("hospital.example", "192.0.2.7", ("*.hospital.example",), False),
        ("potluck.example.", "192.0.2.7", ("potluck.example",), True),
        ("potluck.example.evil.example", "192.0.2.7", ("potluck.example",), False),
        ("localhost:8443", "172.17.0.2", (), True),
        ("127.0.0.1:9443", "172.17.0.2", (), True),
    ],
)
def test_names_of_a_server(authority, local, names, is_ours):
    assert is_called(authority, local, names) == is_ours


@pytest.mark.parametrize("name", ["https://a.example", "a.example/x", "", "a b", "a..b", ":8443"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match="name must look like"):
        all_names([name], "127.0.0.1", None)


def test_a_name_may_be_of_any_form_that_a_browser_takes():
    assert host_of("münchen.example:8443") == "xn--mnchen-3ya.example"
    assert host_of("[2001:db8::1]:8443") == host_of("2001:db8::1") == "2001:db8::1"


def test_each_enrolment_has_a_key_of_its_own(tmp_path):
    """Also where the folder is the same; but an enrolment that was interrupted goes on."""
    home = Home(tmp_path / "d")
    home.expect("first")
    key = home.key()
    home.accept_manifest(7)
    (home.folder / "outbox").mkdir()
    (home.folder / "outbox" / "residual").write_bytes(b"of the run before")
    home.expect("first")
    assert (home.key(), home.manifest) == (key, (0, 7))
    home.expect("second")
    assert home.key() != key
    assert home.manifest == (0, 0)
    assert not (home.folder / "outbox").exists()
    home.close()


def test_a_folder_that_moves_to_another_server_is_another_device_there(tmp_path):
    keys = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with Federation(tmp_path / name, rounds=1, clients=1) as federation:
            federation.folder = tmp_path  # of the device, the same
            device = federation.join(0, UnitTrainer())
            device.end()
            assert device.died is None, device.died
            home = Home(tmp_path / "device0")
            keys.append(public_key(home.key()).hex())
            home.close()
            assert [row["id"] for row in federation.service.devices(federation.run)]
        (tmp_path / "device0" / "enrolment.json").unlink()
    assert keys[0] != keys[1]
