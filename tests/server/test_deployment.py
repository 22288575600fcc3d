"""The files under deploy/, and the ways to a server that they make, as far as one machine shows."""

from __future__ import annotations

import datetime
import re
import shlex
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from test_proxies import pass_on

from federation import Federation, UnitTrainer

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def commands():
    """The `potluck` commands in units and in the compose file, in words."""
    found = []
    for unit in DEPLOY.glob("*.service"):
        started = re.search(r"^ExecStart=\S*/potluck (.*)$", unit.read_text(), re.MULTILINE)
        found.append(shlex.split(started[1]))
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return [
        *found,
        re.sub(r"\$\{\w+:[^}]*\}", "x", compose["services"]["potluck"]["command"]).split(),
    ]


def test_every_command_that_is_deployed_has_the_options_it_is_given():
    documented = (ROOT / "docs" / "cli.md").read_text()
    for name, *words in commands():
        section = documented.partition(f"\n## potluck {name}\n")[2].partition("\n## ")[0]
        assert section, name
        options = [word for word in words if word.startswith("--")]
        assert [one for one in options if one not in section] == [], (name, options)


def test_the_compose_file_names_what_it_has():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    services, volumes = compose["services"], compose["volumes"]
    assert (DEPLOY / services["potluck"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / services["potluck"]["build"]["dockerfile"]).exists()
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            is_healthy = how["condition"] == "service_healthy"
            assert "healthcheck" in services[other] or not is_healthy, name
        for place in service.get("volumes", []):
            source = place.partition(":")[0]
            assert source in volumes or source.startswith("./"), (name, place)


def test_what_the_image_copies_is_there():
    copied = re.findall(r"^COPY (.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
@pytest.mark.parametrize("name", ["potluck-server", "potluck-device"])
def test_systemd_takes_the_units(tmp_path, name):
    unit = (DEPLOY / f"{name}.service").read_text()
    made = tmp_path / f"{name}.service"
    made.write_text(unit.replace("/opt/potluck/bin/potluck", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", made], capture_output=True, text=True
    )
    told = [line for line in done.stderr.splitlines() if made.name in line]
    assert (done.returncode, told) == (0, [])


def test_what_is_installed_is_what_was_tested_and_has_hashes():
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    text = "".join(path.read_text() for path in DEPLOY.glob("requirements*.txt"))
    blocks = re.split(r"\n(?=[a-z])", text)
    pinned = [re.match(r"([\w.-]+)==([^\s;]+)", block) for block in blocks]
    for block, pin in zip(blocks, pinned, strict=True):
        assert pin is None or "--hash=sha256:" in block, block[:80]
        if pin is not None and pin[1] in tested:
            assert pin[2] == tested[pin[1]], pin[1]
    assert {"torch", "cryptography", "psycopg", "obstore"} <= {pin[1] for pin in pinned if pin}


class Terminator(socketserver.BaseRequestHandler):
    """Ends TLS, and passes on what is inside to a server on loopback."""

    def handle(self):
        try:
            inside = self.server.context.wrap_socket(self.request, server_side=True)
        except OSError:
            return
        with inside, socket.create_connection(("127.0.0.1", self.server.to)) as there:
            pass_on(inside, there)


class ReverseProxy(socketserver.ThreadingTCPServer):
    """A reverse proxy on loopback that ends TLS, until the end of the block."""

    daemon_threads = True

    def __init__(self, to, context):
        super().__init__(("127.0.0.1", 0), Terminator)
        self.to, self.context = to, context
        threading.Thread(target=self.serve_forever, args=(0.05,)).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def authority(folder, name):
    """A private authority's certificate, and a certificate of this name by it with its key."""
    made = {}
    for subject in ("authority", name):
        key = ec.generate_private_key(ec.SECP256R1())
        named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
        issuer, signer = made.get("authority", (named, key))
        now = datetime.datetime.now(datetime.UTC)
        ends = now + datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(issuer, named, key.public_key(), 1, now, ends)
        is_authority = x509.BasicConstraints(ca=subject == "authority", path_length=None)
        builder = builder.add_extension(is_authority, critical=True)
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        certificate = builder.add_extension(names, critical=False).sign(signer, hashes.SHA256())
        made[subject] = (named, key)
        (folder / f"{subject}.pem").write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
        )
        (folder / f"{subject}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    return folder / "authority.pem", folder / f"{name}.pem", folder / f"{name}.key"


def test_a_device_comes_by_name_through_a_proxy_that_ends_tls(tmp_path, monkeypatch):
    trusted, certificate, key = authority(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with (
        Federation(tmp_path, clients=1, rounds=1, plaintext=True) as federation,
        ReverseProxy(federation.port, context) as proxy,
    ):
        address = f"https://localhost:{proxy.server_address[1]}"
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        device = federation.join(0, UnitTrainer(), address=address)
        federation.until(lambda: federation.status()["state"] == "finished" or device.died)
        device.end()
        assert (device.count("accepted"), device.died) == (1, None)
