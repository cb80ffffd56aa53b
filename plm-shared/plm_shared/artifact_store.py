"""Where the files that runs produce are kept: a local folder, or an S3 bucket.

The path of an artifact is frozen: ``{tenant_id}/{trace_id}/{artifact_id}.{ext}``.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

__all__ = [
    "DEFAULT_MAX_BYTES",
    "ArtifactRef",
    "ArtifactSizeExceeded",
    "ArtifactStorageBackend",
    "LocalFilesystemBackend",
    "ObjectStoreBackend",
    "StoredArtifact",
]

DEFAULT_MAX_BYTES: Final = 100 * 1024 * 1024
_CHUNK: Final = 64 * 1024
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


class ArtifactSizeExceeded(ValueError):
    """The data is larger than the backend takes; what was stored before under the same name is untouched."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the artifact is larger than {max_bytes} bytes; raise max_bytes or store less")
        self.max_bytes = max_bytes


@dataclass(frozen=True)
class ArtifactRef:
    """The name of an artifact.

    Raises:
        ValueError: the tenant is no UUID in its canonical text, or a part could leave its folder: only ASCII letters,
            digits, ``_``, ``-`` and single dots are taken, none of them a dot at the start.
    """

    tenant_id: str
    trace_id: str
    artifact_id: str
    ext: str

    def __post_init__(self) -> None:
        for name in ("tenant_id", "trace_id", "artifact_id", "ext"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _PART.fullmatch(value) or ".." in value:
                raise ValueError(f"ArtifactRef.{name} must be a plain name (letters, digits, '_', '-', '.'): {value!r}")
        try:
            canonical = str(uuid.UUID(self.tenant_id))
        except ValueError:
            canonical = ""
        if canonical != self.tenant_id:
            raise ValueError(f"ArtifactRef.tenant_id must be a UUID in lower case with hyphens: {self.tenant_id!r}")

    @property
    def relative_path(self) -> str:
        """The frozen layout, with ``/`` on every system."""
        return f"{self.tenant_id}/{self.trace_id}/{self.artifact_id}.{self.ext}"


@dataclass(frozen=True, kw_only=True)
class StoredArtifact:
    """What was stored, measured while it was written."""

    uri: str
    size_bytes: int
    sha256: str


class ArtifactStorageBackend(Protocol):
    """A place for artifacts."""

    def store(self, ref: ArtifactRef, data: BinaryIO) -> StoredArtifact:
        """Store the stream whole or not at all, and tell its size and hash; raises ``ArtifactSizeExceeded``."""

    def put(self, ref: ArtifactRef, data: BinaryIO) -> str:
        """``store``, answering only the URI."""

    def open(self, ref: ArtifactRef) -> Iterator[bytes]:
        """The artifact in chunks; raises ``FileNotFoundError`` at the call, not at the first chunk."""

    def get(self, ref: ArtifactRef) -> bytes:
        """The artifact in one piece; raises ``FileNotFoundError``."""

    def presign_url(self, ref: ArtifactRef, expires_in: int = 3600) -> str:
        """An address that gives the artifact to whoever holds it."""

    def delete(self, ref: ArtifactRef) -> None:
        """Remove the artifact; does nothing when it is not there."""


class _Meter:
    """Reads through, counts, hashes, and stops at the limit. Not seekable, so that a client streams it once."""

    def __init__(self, data: BinaryIO, max_bytes: int) -> None:
        self._data = data
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        chunk = self._data.read(size)
        self.size_bytes += len(chunk)
        if self.size_bytes > self._max_bytes:
            raise ArtifactSizeExceeded(self._max_bytes)
        self._hash.update(chunk)
        return chunk

    def stored_at(self, uri: str) -> StoredArtifact:
        return StoredArtifact(uri=uri, size_bytes=self.size_bytes, sha256=self._hash.hexdigest())


class LocalFilesystemBackend:
    """Artifacts in a folder, readable by this account only; a crash leaves the old content or the new, never a part."""

    def __init__(self, root: Path | str, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._root = Path(root).absolute()
        self._max_bytes = max_bytes
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def store(self, ref: ArtifactRef, data: BinaryIO) -> StoredArtifact:
        """Write beside the final place, flush to disk, then rename.

        Raises:
            ArtifactSizeExceeded: nothing was stored; an older version stands.
        """
        target = self._path(ref)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        meter = _Meter(data, self._max_bytes)
        descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                while chunk := meter.read(_CHUNK):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(target)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        _flush_folder(target.parent)
        return meter.stored_at(target.as_uri())

    def put(self, ref: ArtifactRef, data: BinaryIO) -> str:
        """``store``, answering only the ``file://`` URI."""
        return self.store(ref, data).uri

    def open(self, ref: ArtifactRef) -> Iterator[bytes]:
        """The file in chunks; closed at the end or with the iterator."""
        return _chunks(self._path(ref).open("rb"))

    def get(self, ref: ArtifactRef) -> bytes:
        """The file's bytes."""
        return self._path(ref).read_bytes()

    def presign_url(self, ref: ArtifactRef, expires_in: int = 3600) -> str:  # noqa: ARG002 - a file's address stays
        """The ``file://`` URI.

        Raises:
            FileNotFoundError: there is no such artifact.
        """
        return self._path(ref).resolve(strict=True).as_uri()

    def delete(self, ref: ArtifactRef) -> None:
        """Remove the file if it is there."""
        self._path(ref).unlink(missing_ok=True)

    def _path(self, ref: ArtifactRef) -> Path:
        return self._root / ref.relative_path


class ObjectStoreBackend:
    """Artifacts in an S3 bucket. The size limit holds while streaming: too much data is never fully uploaded.

    Raises:
        ImportError: boto3 is missing and no ``client`` was given.
    """

    def __init__(
        self,
        *,
        bucket: str,
        endpoint_url: str | None = None,
        region_name: str | None = None,
        aws_access_key_id: str | None = None,
        aws_secret_access_key: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        client: Any = None,
    ) -> None:
        self._bucket = bucket
        self._max_bytes = max_bytes
        self._client = client or _s3_client(
            endpoint_url=endpoint_url,
            region_name=region_name,
            aws_access_key_id=aws_access_key_id,
            aws_secret_access_key=aws_secret_access_key,
        )

    def store(self, ref: ArtifactRef, data: BinaryIO) -> StoredArtifact:
        """Stream into the bucket.

        Raises:
            ArtifactSizeExceeded: nothing was stored; an older version stands.
        """
        meter = _Meter(data, self._max_bytes)
        self._client.upload_fileobj(meter, Bucket=self._bucket, Key=ref.relative_path)
        return meter.stored_at(f"s3://{self._bucket}/{ref.relative_path}")

    def put(self, ref: ArtifactRef, data: BinaryIO) -> str:
        """``store``, answering only the ``s3://`` URI."""
        return self.store(ref, data).uri

    def open(self, ref: ArtifactRef) -> Iterator[bytes]:
        """The object in chunks.

        Raises:
            FileNotFoundError: there is no such artifact.
        """
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=ref.relative_path)
        except self._client.exceptions.NoSuchKey as error:
            raise FileNotFoundError(f"s3://{self._bucket}/{ref.relative_path}") from error
        return _chunks(answer["Body"])

    def get(self, ref: ArtifactRef) -> bytes:
        """The object's bytes; raises as ``open`` does."""
        return b"".join(self.open(ref))

    def presign_url(self, ref: ArtifactRef, expires_in: int = 3600) -> str:
        """A signed address, good for ``expires_in`` seconds."""
        url = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": ref.relative_path}, ExpiresIn=expires_in
        )
        return str(url)

    def delete(self, ref: ArtifactRef) -> None:
        """Remove the object; S3 does not mind when it is not there."""
        self._client.delete_object(Bucket=self._bucket, Key=ref.relative_path)


def _s3_client(**options: str | None) -> Any:
    try:
        import boto3
    except ImportError as error:
        raise ImportError("ObjectStoreBackend needs boto3: install plm-shared[s3], or pass client=") from error
    return boto3.client("s3", **options)


def _chunks(stream: Any) -> Iterator[bytes]:
    with closing(stream):
        while chunk := stream.read(_CHUNK):
            yield chunk


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
