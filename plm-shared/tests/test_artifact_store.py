"""Artifacts stay inside their folder, whole or not at all; the same promises for a folder and for S3."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plm_shared.artifact_store import (
    ArtifactRef,
    ArtifactSizeExceeded,
    ArtifactStorageBackend,
    LocalFilesystemBackend,
    ObjectStoreBackend,
)

REF = ArtifactRef(str(uuid.uuid4()), "trace", "report-1", "html")
LIMIT = 200_000


class ObjectServer(http.server.BaseHTTPRequestHandler):
    """The four S3 requests that the backend makes, on memory."""

    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        if "chunked" in self.headers.get("Content-Encoding", ""):
            body = self._chunked()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[self.path.partition("?")[0]] = body
        self._answer(200)

    def do_GET(self) -> None:
        body = self.objects.get(self.path.partition("?")[0])
        if body is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._answer(200, body)

    def do_DELETE(self) -> None:
        self.objects.pop(self.path.partition("?")[0], None)
        self._answer(204)

    def log_message(self, *_: Any) -> None:
        pass

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[str]:
    handler = type("Handler", (ObjectServer,), {"objects": {}, "protocol_version": "HTTP/1.1"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["local", "s3"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStorageBackend]:
    if request.param == "local":
        yield LocalFilesystemBackend(tmp_path / "artifacts", max_bytes=LIMIT)
        return
    store = ObjectStoreBackend(
        bucket="bucket",
        endpoint_url=request.getfixturevalue("endpoint"),
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
        max_bytes=LIMIT,
    )
    yield store
    store._client.close()


def test_what_is_stored_comes_back_with_its_size_and_hash(backend: ArtifactStorageBackend) -> None:
    data = os.urandom(150_000)
    stored = backend.store(REF, io.BytesIO(data))
    assert (stored.size_bytes, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert stored.uri.endswith(REF.relative_path)
    assert backend.get(REF) == data
    chunks = list(backend.open(REF))
    assert b"".join(chunks) == data
    assert len(chunks) > 1


def test_an_empty_artifact_is_an_artifact(backend: ArtifactStorageBackend) -> None:
    assert backend.put(REF, io.BytesIO(b"")).endswith(".html")
    assert backend.get(REF) == b""


def test_too_much_data_is_refused_and_the_old_version_stands(backend: ArtifactStorageBackend) -> None:
    backend.put(REF, io.BytesIO(b"old"))
    with pytest.raises(ArtifactSizeExceeded) as caught:
        backend.put(REF, io.BytesIO(bytes(LIMIT + 1)))
    assert caught.value.max_bytes == LIMIT
    assert backend.get(REF) == b"old"
    backend.put(REF, io.BytesIO(bytes(LIMIT)))
    assert len(backend.get(REF)) == LIMIT


def test_a_missing_artifact_is_a_missing_file_and_deleting_it_is_fine(backend: ArtifactStorageBackend) -> None:
    backend.delete(REF)
    for read in (backend.get, backend.open):
        with pytest.raises(FileNotFoundError):
            read(REF)
    backend.put(REF, io.BytesIO(b"x"))
    backend.delete(REF)
    with pytest.raises(FileNotFoundError):
        backend.get(REF)


def test_a_presigned_address_gives_the_artifact(backend: ArtifactStorageBackend) -> None:
    backend.put(REF, io.BytesIO(b"data"))
    with urllib.request.urlopen(backend.presign_url(REF, expires_in=60)) as answer:  # noqa: S310 - our own address
        assert answer.read() == b"data"


@pytest.mark.parametrize("part", ["tenant_id", "trace_id", "artifact_id", "ext"])
@pytest.mark.parametrize(
    "value", ["", "..", "a/../b", "/etc/passwd", "a/b", "a\\b", ".hidden", "a..b", "a\0b", "a\n", "é", "x" * 200, 7]
)
def test_a_name_that_could_leave_its_folder_is_refused(part: str, value: Any) -> None:
    parts = {"tenant_id": REF.tenant_id, "trace_id": "t", "artifact_id": "a", "ext": "txt", part: value}
    with pytest.raises(ValueError, match=part):
        ArtifactRef(**parts)


@pytest.mark.parametrize("tenant", ["tenant", REF.tenant_id.upper(), REF.tenant_id.replace("-", "")])
def test_the_tenant_of_an_artifact_is_a_canonical_uuid(tenant: str) -> None:
    if tenant != REF.tenant_id:
        with pytest.raises(ValueError, match="tenant_id"):
            ArtifactRef(tenant, "t", "a", "txt")


def test_the_layout_is_frozen(tmp_path: Path) -> None:
    assert REF.relative_path == f"{REF.tenant_id}/trace/report-1.html"
    assert LocalFilesystemBackend(tmp_path).put(REF, io.BytesIO(b"")) == (tmp_path / REF.relative_path).as_uri()


def test_a_presigned_address_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalFilesystemBackend(tmp_path).presign_url(REF)


def test_a_stream_that_fails_leaves_the_old_version_and_no_remains(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError("the source went away")

    store = LocalFilesystemBackend(tmp_path)
    store.put(REF, io.BytesIO(b"old"))
    with pytest.raises(OSError, match="went away"):
        store.put(REF, Broken())
    assert store.get(REF) == b"old"
    assert [file.name for file in (tmp_path / REF.relative_path).parent.iterdir()] == ["report-1.html"]


def test_a_writer_killed_in_the_middle_leaves_the_old_version(tmp_path: Path) -> None:
    store = LocalFilesystemBackend(tmp_path)
    store.put(REF, io.BytesIO(b"old"))
    script = (
        "import sys, os, io; from plm_shared.artifact_store import *\n"
        "class Dying(io.BytesIO):\n"
        "    def read(self, size=-1):\n"
        "        chunk = super().read(size)\n"
        "        if not chunk: os.kill(os.getpid(), 9)\n"
        "        return chunk\n"
        "LocalFilesystemBackend(sys.argv[1]).put(ArtifactRef(*sys.argv[2:]), Dying(b'new'))\n"
    )
    words = [REF.tenant_id, REF.trace_id, REF.artifact_id, REF.ext]
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path), *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert store.get(REF) == b"old"


def test_files_are_readable_by_this_account_only(tmp_path: Path) -> None:
    LocalFilesystemBackend(tmp_path / "new").put(REF, io.BytesIO(b"x"))
    file = tmp_path / "new" / REF.relative_path
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, tmp_path / "new")] == [
        0o600,
        0o700,
        0o700,
    ]
