"""Samples: the table is sound, blood is always the same, and a fetch trusts nothing in silence."""

from __future__ import annotations

import gzip
import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from headless.data import samples
from headless.data.samples import RemoteFile, Sample, fetch, get, table
from headless.errors import MosaicError

CONTENT = b"counts " * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    files: ClassVar[dict[str, bytes]] = {"/data.h5": CONTENT, "/data.h5ad.gz": gzip.compress(CONTENT)}

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path == "/torn.h5":  # breaks off in the middle
            self.send_response(200)
            self.send_header("Content-Length", "9999")
            self.end_headers()
            self.wfile.write(b"half")
            return
        body = self.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def sample(url: str, **values: str | None) -> Sample:
    return Sample(
        name="x", title="X", kind="download", modalities=("rna",), organism="", size="", licence="", citation="",
        note="", files=(RemoteFile.model_validate({"url": url, **values}),),
    )  # fmt: skip


def test_the_table_is_sound() -> None:
    names = [row.name for row in table()]
    assert names[0] == "blood"
    assert len(names) == len(set(names))
    for row in table():
        assert (row.kind == "simulated") == (not row.files)
        assert row.licence
        for file in row.files:
            assert row.citation
            assert file.url.startswith("https://")
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(MosaicError, match=r"'bloed'.*blood, pbmc10k_cite") as caught:
        get("bloed")
    assert caught.value.exit_code == 2


def test_blood_is_made_without_network_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "BLOOD", {**samples.BLOOD, "n_cells": 60})
    first = fetch("blood", tmp_path / "a")
    again = fetch("blood", tmp_path / "b")
    assert [path.name for path in first] == ["cite.h5mu", "multiome.h5mu", "asap.h5mu", "tea.h5mu"]
    import mudata

    with mudata.set_options(pull_on_update=False):
        one, two = mudata.read_h5mu(first[0]), mudata.read_h5mu(again[0])
    assert (one["rna"].X != two["rna"].X).nnz == 0
    assert list(one.obs_names) == list(two.obs_names)


def test_a_file_with_a_published_checksum_is_fetched_once(server: str, tmp_path: Path) -> None:
    notes: list[str] = []
    wanted = sample(f"{server}/data.h5", sha256=SHA)
    for _ in range(2):
        [path] = fetch(wanted, tmp_path, notes.append)
        assert path.read_bytes() == CONTENT
    assert Handler.asked == ["/data.h5"]
    assert notes == []


def test_without_a_checksum_it_says_so_and_remembers_what_came(server: str, tmp_path: Path) -> None:
    notes: list[str] = []
    wanted = sample(f"{server}/data.h5")
    [path] = fetch(wanted, tmp_path, notes.append)
    assert "could not be verified" in notes[0]
    assert SHA in notes[0]
    assert (tmp_path / "data.h5.sha256").read_text() == f"{SHA}  data.h5\n"
    path.write_bytes(b"tampered with")
    with pytest.raises(MosaicError, match="not what was fetched") as caught:
        fetch(wanted, tmp_path, notes.append)
    assert caught.value.code == "data.changed_file"


def test_a_wrong_checksum_keeps_nothing(server: str, tmp_path: Path) -> None:
    with pytest.raises(MosaicError) as caught:
        fetch(sample(f"{server}/data.h5", sha256="0" * 64), tmp_path)
    assert caught.value.code == "network.checksum"
    assert list(tmp_path.iterdir()) == []


def test_a_packed_file_is_unpacked(server: str, tmp_path: Path) -> None:
    sha = hashlib.sha256(Handler.files["/data.h5ad.gz"]).hexdigest()
    [path] = fetch(sample(f"{server}/data.h5ad.gz", sha256=sha), tmp_path)
    assert path.name == "data.h5ad"
    assert path.read_bytes() == CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.h5ad", "data.h5ad.sha256"]


def test_a_file_that_was_not_fetched_is_left_alone(server: str, tmp_path: Path) -> None:
    (tmp_path / "data.h5").write_bytes(b"mine")
    with pytest.raises(MosaicError) as caught:
        fetch(sample(f"{server}/data.h5"), tmp_path)
    assert caught.value.code == "disk.exists"
    assert (tmp_path / "data.h5").read_bytes() == b"mine"


def test_no_network_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MosaicError, match=r"no answer from 127\.0\.0\.1") as caught:
        fetch(sample(f"http://127.0.0.1:{port}/data.h5"), tmp_path)
    assert caught.value.code == "network.offline"
    assert caught.value.exit_code == 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["absent.h5", "torn.h5"])
def test_a_failed_fetch_leaves_nothing_behind(server: str, tmp_path: Path, path: str) -> None:
    with pytest.raises(MosaicError) as caught:
        fetch(sample(f"{server}/{path}"), tmp_path)
    assert caught.value.code in ("network.failed", "network.offline")
    assert list(tmp_path.iterdir()) == []
