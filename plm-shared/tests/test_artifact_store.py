"""Artifacts stay inside their folder, whole or not at all; the same promises for a folder and for S3."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plm_shared.artifact_store import (
    ArtifactCorrupt,
    ArtifactExists,
    ArtifactRef,
    ArtifactSizeExceeded,
    ArtifactStorageBackend,
    LocalFilesystemBackend,
    ObjectStoreBackend,
    open_store,
)

REF = ArtifactRef(str(uuid.uuid4()), "trace", "report-1", "html")
LIMIT = 20 * 1024 * 1024
SOAK = float(os.environ.get("SOAK", "0.05"))


CREDENTIALS = {"region_name": "us-east-1", "aws_access_key_id": "testaccess", "aws_secret_access_key": "testsecret1"}
SERVERS = ["moto", "nanio", *(["external"] if "S3_ENDPOINT_URL" in os.environ else [])]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(words: list[str], port: int) -> subprocess.Popen[bytes]:
    """A server of the test's own, once it accepts connections."""
    program = str(Path(sys.executable).with_name(words[0]))
    keys = {
        "NANIO_ACCESS_KEY": CREDENTIALS["aws_access_key_id"],
        "NANIO_SECRET_KEY": CREDENTIALS["aws_secret_access_key"],
    }
    server = subprocess.Popen(
        [program, *words[1:]], env={**os.environ, **keys}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            continue
        return server
    raise AssertionError(f"{words[0]} ended with {server.returncode}")


@pytest.fixture(scope="session")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, str]]]:
    """Per server how to reach a bucket of it."""
    servers = []
    found = {}
    for name in ("moto", "nanio"):
        port = free_port()
        words = ["moto_server", "-H", "127.0.0.1", "-p", str(port)]
        if name == "nanio":
            words = ["nanio", "serve", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
            words += ["--data-dir", str(tmp_path_factory.mktemp("nanio"))]
        servers.append(started(words, port))
        found[name] = {"bucket": "artifacts", "endpoint_url": f"http://127.0.0.1:{port}", **CREDENTIALS}
        made = ObjectStoreBackend(**found[name])
        made._client.create_bucket(Bucket="artifacts")
        made._client.close()
    if "S3_ENDPOINT_URL" in os.environ:
        found["external"] = {
            "bucket": os.environ["S3_BUCKET"],
            "endpoint_url": os.environ["S3_ENDPOINT_URL"],
            "aws_access_key_id": os.environ["S3_ACCESS_KEY"],
            "aws_secret_access_key": os.environ["S3_SECRET_KEY"],
        }
    yield found
    for server in servers:
        server.terminate()
    for server in servers:
        server.wait()


@pytest.fixture
def bucket(request: pytest.FixtureRequest, buckets: dict[str, dict[str, str]]) -> dict[str, str]:
    return buckets[request.param]


@pytest.fixture(params=["local", *SERVERS])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStorageBackend]:
    if request.param == "local":
        yield LocalFilesystemBackend(tmp_path / "artifacts", max_bytes=LIMIT)
        return
    store = ObjectStoreBackend(**request.getfixturevalue("buckets")[request.param], max_bytes=LIMIT)
    store.delete(REF)
    yield store
    store.delete(REF)
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


def test_more_than_one_part_comes_back_whole(backend: ArtifactStorageBackend) -> None:
    data = os.urandom(1024) * 1024 * 17
    stored = backend.store(REF, io.BytesIO(data))
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    assert hashlib.sha256(b"".join(backend.open(REF))).hexdigest() == stored.sha256


def test_a_stream_that_hands_out_little_at_a_time_is_stored_whole(backend: ArtifactStorageBackend) -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(7)

    backend.put(REF, Trickle(b"0123456789" * 10))
    assert backend.get(REF) == b"0123456789" * 10


def test_a_stream_that_breaks_off_after_some_parts_leaves_the_old_version(backend: ArtifactStorageBackend) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            chunk = super().read(size)
            if not chunk:
                raise OSError("the source went away")
            return chunk

    backend.put(REF, io.BytesIO(b"old"))
    with pytest.raises(OSError, match="went away"):
        backend.put(REF, Broken(bytes(9 * 1024 * 1024)))
    assert backend.get(REF) == b"old"


@pytest.mark.parametrize("size", [3, 9 * 1024 * 1024])
def test_what_exists_is_not_replaced_when_it_must_be_absent(backend: ArtifactStorageBackend, size: int) -> None:
    backend.store(REF, io.BytesIO(b"first"), only_if_absent=True)
    with pytest.raises(ArtifactExists) as caught:
        backend.store(REF, io.BytesIO(bytes(size)), only_if_absent=True)
    assert caught.value.uri.endswith(REF.relative_path)
    assert backend.get(REF) == b"first"
    backend.put(REF, io.BytesIO(b"second"))
    assert backend.get(REF) == b"second"


@pytest.mark.parametrize("bucket", SERVERS, indirect=True)
def test_the_condition_is_the_servers_where_it_honours_it(bucket: dict[str, str]) -> None:
    store = ObjectStoreBackend(**bucket)
    honours = store.conditional_put
    store.put(REF, io.BytesIO(b"first"))
    if honours:
        store._head = lambda _: None  # type: ignore[method-assign] # another writer slips in after the look
        with pytest.raises(ArtifactExists):
            store.store(REF, io.BytesIO(b"second"), only_if_absent=True)
        assert store.get(REF) == b"first"
    store.delete(REF)
    store._client.close()


def test_an_address_expires_and_a_wrong_key_opens_nothing(buckets: dict[str, dict[str, str]]) -> None:
    store = ObjectStoreBackend(**buckets["nanio"])
    store.put(REF, io.BytesIO(b"data"))
    brief = store.presign_url(REF, expires_in=1)
    while True:  # until the server's own clock has passed the second
        try:
            with urllib.request.urlopen(brief) as answer:  # noqa: S310 - our own address
                assert answer.read() == b"data"
        except urllib.error.HTTPError as error:
            refused = error.code
            error.close()
            break
    assert refused == 403
    stranger = ObjectStoreBackend(**{**buckets["nanio"], "aws_secret_access_key": "not-the-secret"})
    with pytest.raises(stranger._client.exceptions.ClientError, match="SignatureDoesNotMatch"):
        stranger.get(REF)
    for bad in (0, 8 * 24 * 3600):
        with pytest.raises(ValueError, match="expires_in"):
            store.presign_url(REF, expires_in=bad)
    store.delete(REF)
    for each in (store, stranger):
        each._client.close()


def test_a_download_that_breaks_off_goes_on_where_it_was(buckets: dict[str, dict[str, str]]) -> None:
    from botocore.exceptions import ReadTimeoutError

    store = ObjectStoreBackend(**buckets["moto"])
    data = os.urandom(300_000)
    store.put(REF, io.BytesIO(data))
    request = store._client.get_object
    broken = []

    class Breaking:
        def __init__(self, body: Any) -> None:
            self._body = body
            self._left = 2

        def read(self, size: int) -> bytes:
            self._left -= 1
            if self._left < 0:
                broken.append(1)
                raise ReadTimeoutError(endpoint_url="test")
            return bytes(self._body.read(size))

        def close(self) -> None:
            self._body.close()

    def breaking(**options: Any) -> Any:
        answer = request(**options)
        return {**answer, "Body": Breaking(answer["Body"]) if len(broken) < 2 else answer["Body"]}

    store._client.get_object = breaking
    assert store.get(REF) == data
    assert len(broken) == 2
    store._client.get_object = request
    store.delete(REF)
    store._client.close()


def test_a_server_that_is_overloaded_for_a_moment_is_asked_again(buckets: dict[str, dict[str, str]]) -> None:
    from botocore.awsrequest import AWSResponse
    from urllib3 import HTTPResponse

    store = ObjectStoreBackend(**buckets["moto"])
    asked: Counter[str] = Counter()

    def overloaded_twice(request: Any, **_: Any) -> AWSResponse | None:
        name = f"{request.method} {request.url}"
        asked[name] += 1
        return (
            AWSResponse(request.url, 503, {}, HTTPResponse(io.BytesIO(), preload_content=False))
            if asked[name] < 3
            else None
        )

    store._client.meta.events.register("before-send.s3", overloaded_twice)
    data = os.urandom(9 * 1024 * 1024)
    store.put(REF, io.BytesIO(data))
    assert store.get(REF) == data
    assert set(asked.values()) == {3}
    assert any("partNumber=2" in name for name in asked)
    store._client.close()


STREAMED = """
import json, resource, sys
from plm_shared.artifact_store import *
size, options, parts = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
class Zeros:
    left = size
    def read(self, most):
        chunk = bytes(min(most, self.left))
        self.left -= len(chunk)
        return chunk
most = 2**40
store = LocalFilesystemBackend(options["root"], most) if "root" in options else (
    ObjectStoreBackend(**options, max_bytes=most)
)
ref = ArtifactRef(*parts)
import io
store.put(ref, io.BytesIO(b"warm")); store.get(ref)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert store.store(ref, Zeros()).size_bytes == size
assert sum(len(chunk) for chunk in store.open(ref)) == size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
store.delete(ref)
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("place", ["local", "nanio"])
def test_a_large_artifact_needs_little_memory(buckets: dict[str, dict[str, str]], tmp_path: Path, place: str) -> None:
    """A gibibyte at full size; smaller ones are still many times what is allowed."""
    options = {"root": str(tmp_path)} if place == "local" else buckets[place]
    size = int(2**30 * max(SOAK, 0.25))
    words = [str(size), json.dumps(options), REF.tenant_id, REF.trace_id, "large", "bin"]
    said = subprocess.run([sys.executable, "-c", STREAMED, *words], capture_output=True, text=True, check=True).stdout
    assert int(said) < 64 * 1024


def tamper(backend: ArtifactStorageBackend, folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change what is stored behind the backend's back, as a bad disk or a meddler would: the metadata stays."""
    if isinstance(backend, ObjectStoreBackend):
        place = {"Bucket": backend._bucket, "Key": REF.relative_path}
        found = backend._client.get_object(**place)
        backend._client.put_object(**place, Body=change(found["Body"].read()), Metadata=found["Metadata"])
    else:
        file = folder / "artifacts" / REF.relative_path
        file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize("size", [200_000, 9 * 1024 * 1024])
def test_a_changed_byte_is_noticed_before_the_last_of_the_artifact_is_handed_out(
    backend: ArtifactStorageBackend, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    backend.put(REF, io.BytesIO(data))
    tamper(backend, tmp_path, lambda stored: stored[:-1] + bytes([stored[-1] ^ 1]))
    handed_out: list[bytes] = []
    with pytest.raises(ArtifactCorrupt) as caught:
        handed_out.extend(backend.open(REF))
    assert len(b"".join(handed_out)) < len(data)
    assert caught.value.expected == hashlib.sha256(data).hexdigest()
    tamper(backend, tmp_path, lambda _: b"")
    with pytest.raises(ArtifactCorrupt):
        backend.get(REF)
    backend.put(REF, io.BytesIO(data))
    assert backend.get(REF) == data


@pytest.mark.parametrize("bucket", SERVERS, indirect=True)
def test_an_object_without_its_hash_is_not_trusted_and_deleting_leaves_no_note(bucket: dict[str, str]) -> None:
    store = ObjectStoreBackend(**bucket)
    fresh = replace(REF, artifact_id=uuid.uuid4().hex)

    def notes() -> list[str]:
        return [each["Key"] for each in store._client.list_objects_v2(Bucket=bucket["bucket"]).get("Contents", [])]

    store.put(fresh, io.BytesIO(bytes(9 * 1024 * 1024)))
    (note,) = [key for key in notes() if key.startswith(f".sha256/{fresh.relative_path}/")]
    store._client.delete_object(Bucket=bucket["bucket"], Key=note)
    with pytest.raises(ArtifactCorrupt, match="nothing was stored"):
        store.get(fresh)
    store.put(fresh, io.BytesIO(bytes(9 * 1024 * 1024)))
    store.delete(fresh)
    assert not [key for key in notes() if fresh.relative_path in key]
    store._client.put_object(Bucket=bucket["bucket"], Key=fresh.relative_path, Body=b"somebody else's")
    with pytest.raises(ArtifactCorrupt, match="nothing was stored"):
        store.get(fresh)
    store.delete(fresh)
    store._client.close()


@pytest.mark.parametrize("crash_after", ["_remember", "replace"])
def test_a_crash_while_replacing_leaves_an_artifact_that_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_after: str
) -> None:
    class Crash(BaseException):
        pass

    store = LocalFilesystemBackend(tmp_path)
    store.put(REF, io.BytesIO(b"old"))
    remember = store._remember
    calls = []

    def crashing(ref: ArtifactRef, hashes: list[str]) -> None:
        calls.append(hashes)
        if crash_after == "replace" and len(calls) == 2:
            raise Crash
        remember(ref, hashes)
        if crash_after == "_remember":
            raise Crash

    monkeypatch.setattr(store, "_remember", crashing)
    with pytest.raises(Crash):
        store.put(REF, io.BytesIO(b"new"))
    assert LocalFilesystemBackend(tmp_path).get(REF) == (b"old" if crash_after == "_remember" else b"new")


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


def whole_list(backend: ArtifactStorageBackend, tenant_id: str, limit: int) -> list[ArtifactRef]:
    """Every artifact of a tenant, a page at a time."""
    found: list[ArtifactRef] = []
    after = None
    while True:
        page = backend.list(tenant_id, after=after, limit=limit)
        assert len(page.artifacts) <= limit
        found.extend(each.ref for each in page.artifacts)
        if (after := page.after) is None:
            return found


def test_every_artifact_of_a_tenant_is_listed_once_whatever_the_size_of_a_page(backend: ArtifactStorageBackend) -> None:
    tenant, other = str(uuid.uuid4()), str(uuid.uuid4())
    refs = [
        ArtifactRef(tenant, trace, name, ext)
        for trace in ("B", "a", "b")
        for name, ext in (("one", "txt"), ("one.two", "tar"), ("Z", "gz"))
    ]
    for ref in [*refs, replace(refs[0], tenant_id=other)]:
        backend.put(ref, io.BytesIO(b"12345"))
    for limit in (1, 2, 5, len(refs), 1000):
        found = whole_list(backend, tenant, limit)
        assert sorted(found, key=str) == sorted(refs, key=str), limit
    assert whole_list(backend, other, 1000) == [replace(refs[0], tenant_id=other)]
    assert whole_list(backend, str(uuid.uuid4()), 1000) == []
    (listed, *_) = backend.list(tenant).artifacts
    assert listed.size_bytes == 5
    assert -2 < listed.age_seconds < 600, "it was stored a moment ago; servers tell whole seconds"
    for ref in [*refs, replace(refs[0], tenant_id=other)]:
        backend.delete(ref)
    assert whole_list(backend, tenant, 1000) == []


def test_what_comes_and_goes_meanwhile_hides_nothing_that_stays(backend: ArtifactStorageBackend) -> None:
    tenant = str(uuid.uuid4())
    refs = [ArtifactRef(tenant, "trace", f"{number}", "txt") for number in range(6)]
    for ref in refs:
        backend.put(ref, io.BytesIO(b""))
    first = backend.list(tenant, limit=3)
    for ref in refs[1:3]:  # the last of the first page too, after which the next one begins
        backend.delete(ref)
    backend.put(replace(refs[0], artifact_id="00"), io.BytesIO(b""))
    rest = backend.list(tenant, after=first.after, limit=1000)
    assert [each.ref for each in first.artifacts] == refs[:3]
    assert [each.ref for each in rest.artifacts] == refs[3:]
    for listed in backend.list(tenant).artifacts:
        backend.delete(listed.ref)


@pytest.mark.parametrize("place", ["local", "moto"])
def test_names_that_sort_before_the_separator_are_listed_too(
    buckets: dict[str, dict[str, str]], tmp_path: Path, place: str
) -> None:
    """``-`` and ``.`` come before ``/``, so keys and folders have different orders; nanio takes one for the other."""
    tenant = str(uuid.uuid4())
    store = LocalFilesystemBackend(tmp_path) if place == "local" else ObjectStoreBackend(**buckets[place])
    refs = [ArtifactRef(tenant, trace, name, "txt") for trace in ("a", "a-b", "a.b", "ab") for name in ("1", "1-2")]
    for ref in refs:
        store.put(ref, io.BytesIO(b""))
    for limit in (1, 3):
        assert sorted(whole_list(store, tenant, limit), key=str) == sorted(refs, key=str)
    if isinstance(store, ObjectStoreBackend):
        store._client.close()


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_page_of_no_size_or_of_no_tenant_is_refused(tmp_path: Path, limit: int) -> None:
    store = LocalFilesystemBackend(tmp_path)
    with pytest.raises(ValueError, match="limit"):
        store.list(REF.tenant_id, limit=limit)
    for tenant in ("", "..", ".sha256", REF.tenant_id.upper()):
        with pytest.raises(ValueError, match="tenant_id"):
            store.list(tenant)


def test_what_is_no_artifact_is_not_listed(tmp_path: Path) -> None:
    store = LocalFilesystemBackend(tmp_path)
    store.put(REF, io.BytesIO(b"x"))
    folder = (tmp_path / REF.relative_path).parent
    (folder / ".partial-1").write_bytes(b"half")
    (folder / "no-extension").write_bytes(b"")
    (folder / "folder.txt").mkdir()
    (folder / "link.txt").symlink_to("/etc/passwd")
    (folder.parent / "file").write_bytes(b"")
    os.mkfifo(folder / "pipe.txt")
    assert whole_list(store, REF.tenant_id, 1) == [REF]


@pytest.mark.parametrize("part", ["tenant_id", "trace_id", "artifact_id", "ext"])
@pytest.mark.parametrize(
    "value", ["", "..", "a/../b", "/etc/passwd", "a/b", "a\\b", ".hidden", "a..b", "a\0b", "a\n", "é", "x" * 200, 7]
)
def test_a_name_that_could_leave_its_folder_is_refused(part: str, value: Any) -> None:
    parts = {"tenant_id": REF.tenant_id, "trace_id": "t", "artifact_id": "a", "ext": "txt", part: value}
    with pytest.raises(ValueError, match=part):
        ArtifactRef(**parts)


@pytest.mark.parametrize(
    "tenant",
    ["tenant", REF.tenant_id.upper(), REF.tenant_id.replace("-", "")],
    ids=["no UUID", "upper case", "no hyphens"],
)
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
    folder = (tmp_path / REF.relative_path).parent
    assert len(list(folder.iterdir())) == 2, "the part stays for a while"

    class Overtaken(io.BytesIO):
        """While one is stored another one is, which must leave the first one's part alone."""

        def read(self, size: int | None = -1) -> bytes:
            store.put(replace(REF, artifact_id="other"), io.BytesIO(b"other"))
            return super().read(size)

    store.put(REF, Overtaken(b"new"))
    assert store.get(REF) == b"new"
    assert sorted(file.name for file in folder.iterdir()) == ["other.html", "report-1.html"]


def test_what_is_stored_while_an_older_version_is_deleted_is_absent_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = LocalFilesystemBackend(tmp_path), LocalFilesystemBackend(tmp_path)
    store.put(REF, io.BytesIO(b"old"))
    storing = threading.Thread(target=other.put, args=(REF, io.BytesIO(b"new")))
    hash_path = store._hash_path

    def between_content_and_hash(ref: ArtifactRef) -> Path:
        storing.start()
        storing.join(0.5)  # it may have to wait for us
        return hash_path(ref)

    monkeypatch.setattr(store, "_hash_path", between_content_and_hash)
    store.delete(REF)
    storing.join()
    assert other.get(REF) == b"new"


def test_files_are_readable_by_this_account_only(tmp_path: Path) -> None:
    LocalFilesystemBackend(tmp_path / "new").put(REF, io.BytesIO(b"x"))
    file = tmp_path / "new" / REF.relative_path
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent, tmp_path / "new")] == [
        0o600,
        0o700,
        0o700,
    ]


@pytest.mark.parametrize("address", ["ftp://somewhere", "s3://", "s3://user:secret@bucket", "s3://bucket/prefix"])
def test_an_address_that_is_no_place_for_files_is_refused_without_its_secrets(address: str) -> None:
    with pytest.raises(ValueError, match="is no place for files") as caught:
        open_store(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["", "file://"])
def test_a_folder_is_named_by_its_path_or_as_a_url(tmp_path: Path, kind: str) -> None:
    open_store(f"{kind}{tmp_path}/kept").store(REF, io.BytesIO(b"x"))
    assert LocalFilesystemBackend(tmp_path / "kept").get(REF) == b"x"
