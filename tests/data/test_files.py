"""Finding, downloading and checking files, against a real HTTP server on this machine."""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from potluck.core import ChecksumError, DataError, DownloadError
from potluck.data.published_files import (
    FILES,
    PublishedFile,
    catalogue,
    checksums,
    fetch,
    fetch_all,
)

CONTENT = b"twelve bytes"


class Host:
    """A server of a few files; it remembers what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        host = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.asked.append(self.path)
                body = host.files.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def folder(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}/"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    host = Host()
    yield host
    host.close()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("POTLUCK_DATA", raising=False)
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own_folder(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    (folder / "things").mkdir(parents=True)
    monkeypatch.setenv("POTLUCK_DATA", str(folder))
    return folder


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port on which nobody listens."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def thing(*hosts: str, content: bytes = CONTENT, archive: str | None = None) -> PublishedFile:
    return PublishedFile(
        path="things/thing.txt",
        md5=hashlib.md5(content).hexdigest(),
        num_bytes=len(content),
        hosts=hosts,
        archive=archive,
    )


def tar(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def everything_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_in_potluck_data_is_used_without_any_host(own_folder: Path) -> None:
    path = own_folder / "things" / "thing.txt"
    path.write_bytes(CONTENT)
    assert fetch(thing()) == path


def test_a_wrong_file_in_potluck_data_is_a_checksum_error_that_says_what_to_do(
    own_folder: Path,
) -> None:
    path = own_folder / "things" / "thing.txt"
    path.write_bytes(b"something else")
    with pytest.raises(ChecksumError) as caught:
        fetch(thing())
    message = str(caught.value)
    assert str(path) in message
    assert hashlib.md5(CONTENT).hexdigest() in message
    assert hashlib.md5(b"something else").hexdigest() in message
    assert "Remove it" in message


def test_potluck_data_must_name_a_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POTLUCK_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"POTLUCK_DATA must name a folder, got .*nowhere"):
        fetch(thing())


def test_a_file_that_potluck_data_lacks_is_downloaded_into_the_cache(
    own_folder: Path, cache: Path, host: Host
) -> None:
    host.files["/good/thing.txt"] = CONTENT
    path = fetch(thing(host.folder("good")))
    assert path == cache / "things" / "thing.txt"
    assert path.read_bytes() == CONTENT


def test_a_file_is_downloaded_once_and_quietly(
    cache: Path, host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    host.files["/good/thing.txt"] = CONTENT
    first = fetch(thing(host.folder("good")))
    second = fetch(thing(host.folder("good")))
    assert first == second == cache / "things" / "thing.txt"
    assert host.asked == ["/good/thing.txt"]
    assert everything_under(cache) == ["things/thing.txt"]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_next_host_is_asked_after_a_404(cache: Path, host: Host) -> None:
    host.files["/good/thing.txt"] = CONTENT
    path = fetch(thing(host.folder("empty"), host.folder("good")))
    assert path.read_bytes() == CONTENT
    assert host.asked == ["/empty/thing.txt", "/good/thing.txt"]


def test_the_next_host_is_asked_after_a_refused_connection(
    cache: Path, host: Host, refusing: str
) -> None:
    host.files["/good/thing.txt"] = CONTENT
    assert fetch(thing(refusing, host.folder("good"))).read_bytes() == CONTENT


def test_the_next_host_is_asked_after_a_corrupt_file(cache: Path, host: Host) -> None:
    host.files["/bad/thing.txt"] = CONTENT[:-1]
    host.files["/good/thing.txt"] = CONTENT
    assert fetch(thing(host.folder("bad"), host.folder("good"))).read_bytes() == CONTENT


def test_when_every_host_fails_each_is_named_with_its_reason(
    cache: Path, host: Host, refusing: str
) -> None:
    host.files["/bad/thing.txt"] = CONTENT[:-1]
    with pytest.raises(DownloadError) as caught:
        fetch(thing(host.folder("empty"), host.folder("bad"), refusing))
    message = str(caught.value)
    assert f"{host.folder('empty')} (HTTP 404)" in message
    assert f"{host.folder('bad')} (a file with another checksum)" in message
    assert f"{refusing} (ConnectionError)" in message
    assert "POTLUCK_DATA" in message
    assert "things/thing.txt" in message
    assert everything_under(cache) == []


def test_a_damaged_file_in_the_cache_is_downloaded_anew(cache: Path, host: Host) -> None:
    host.files["/good/thing.txt"] = CONTENT
    path = fetch(thing(host.folder("good")))
    path.write_bytes(CONTENT[:5])
    assert fetch(thing(host.folder("good"))).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POTLUCK_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cache must be a folder .* POTLUCK_CACHE"):
        fetch(thing("http://127.0.0.1:9/"))


def test_of_an_archive_only_the_wanted_member_is_kept(
    cache: Path, host: Host, tmp_path: Path
) -> None:
    host.files["/good/all.tar.gz"] = tar(
        ("../../escaped.txt", b"no"), ("/absolute.txt", b"no"), ("v1/thing.txt", CONTENT)
    )
    path = fetch(thing(host.folder("good"), archive="all.tar.gz"))
    assert path.read_bytes() == CONTENT
    assert everything_under(tmp_path) == ["cache/things/thing.txt"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (tar(("v1/other.txt", CONTENT)), "all.tar.gz holds no thing.txt"),
        (tar(("v1/thing.txt", b"forged")), "a file with another checksum"),
        (tar(("v1/thing.txt", CONTENT + b" and more")), "a file with another checksum"),
        (tar(("v1/thing.txt", CONTENT))[:60], "not a whole tar archive"),
        (b"<html>moved</html>", "not a whole tar archive"),
    ],
    ids=["no-member", "forged", "longer", "cut", "no-archive"],  # a body has the time in it
)
def test_an_archive_that_is_not_the_published_one_is_refused(
    cache: Path, host: Host, body: bytes, reason: str
) -> None:
    host.files["/bad/all.tar.gz"] = body
    with pytest.raises(DownloadError, match=reason):
        fetch(thing(host.folder("bad"), archive="all.tar.gz"))
    assert everything_under(cache) == []


@pytest.mark.parametrize("name", ["mnist", "qmnist", "shakespeare", "wisdm"])
def test_the_published_files_are_what_the_registry_says(
    name: str, published: Callable[[str], list[Path]]
) -> None:
    paths = published(name)
    assert fetch_all(name) == paths
    for path in paths:
        assert path.stat().st_size == FILES[f"{name}/{path.name}"].num_bytes


def test_the_catalogue_lists_every_data_set_and_whether_it_is_present(
    own_folder: Path, cache: Path
) -> None:
    entries = {entry.name: entry for entry in catalogue()}
    assert list(entries) == [
        "digits", "mnist", "pythonlib", "qmnist", "shakespeare", "wisdm",
    ]  # fmt: skip
    assert entries["mnist"].num_files == 4
    assert entries["mnist"].num_bytes == 11_594_722
    assert [name for name, entry in entries.items() if entry.present] == ["digits", "pythonlib"]
    assert all(entry.what and entry.terms for entry in entries.values())
    (own_folder / "wisdm").mkdir()
    (own_folder / "wisdm" / "WISDM_ar_v1.1_transformed.arff").write_bytes(bytes(1_197_772))
    present = [entry.name for entry in catalogue() if entry.present]
    assert present == ["digits", "pythonlib", "wisdm"]


def test_every_registered_file_has_hosts_and_an_md5() -> None:
    for path, file in FILES.items():
        assert file.path == path
        assert file.hosts
        assert all(address.startswith("http") and address.endswith("/") for address in file.hosts)
        assert len(bytes.fromhex(file.md5)) == 16
        assert checksums(path) == {path: file.md5}


@pytest.mark.parametrize("name", ["digits", "pythonlib"])
def test_what_is_installed_needs_no_file(name: str) -> None:
    assert fetch_all(name) == []


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of mnist/.*got file='mnist/x'"):
        fetch("mnist/x")
    with pytest.raises(ValueError, match=r"must be one of digits, .*got name='cifar'"):
        fetch_all("cifar")
