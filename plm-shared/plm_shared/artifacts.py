"""What every place for artifacts agrees on: their names, their limits, their errors.

::

    ArtifactSizeExceeded(ValueError)     store less, or raise max_bytes; the old version stands
    ArtifactExists(FileExistsError)      it was to be stored only if absent
    ArtifactCorrupt(OSError)             what came back is not what was stored; never use it
    FileNotFoundError                    there is no such artifact
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Protocol

__all__ = [
    "CHUNK",
    "DEFAULT_MAX_BYTES",
    "LARGEST_PAGE",
    "ArtifactCorrupt",
    "ArtifactExists",
    "ArtifactPage",
    "ArtifactRef",
    "ArtifactSizeExceeded",
    "ArtifactStorageBackend",
    "ListedArtifact",
    "Meter",
    "StoredArtifact",
    "checked_page",
    "chunks_of",
    "ref_at",
    "verified",
]

DEFAULT_MAX_BYTES: Final = 100 * 1024 * 1024
CHUNK: Final = 64 * 1024
LARGEST_PAGE: Final = 1000  # S3's own limit
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")


class ArtifactSizeExceeded(ValueError):
    """The data is larger than the backend takes; what was stored before under the same name is untouched."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the artifact is larger than {max_bytes} bytes; raise max_bytes or store less")
        self.max_bytes = max_bytes


class ArtifactExists(FileExistsError):
    """The artifact was to be stored only if absent, and it is there; it stands as it was."""

    def __init__(self, uri: str) -> None:
        super().__init__(f"{uri} exists; use a new artifact id, or allow it to be replaced")
        self.uri = uri


class ArtifactCorrupt(OSError):
    """The bytes that came back are not those that were stored."""

    def __init__(self, uri: str, *, expected: str, found: str) -> None:
        super().__init__(f"{uri}: SHA-256 is {found}, but {expected} was stored; restore it from a copy")
        self.uri = uri
        self.expected = expected
        self.found = found


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


@dataclass(frozen=True, kw_only=True)
class ListedArtifact:
    """An artifact that is in the store; its age is in seconds by the store's own clock, since its upload at the latest.

    S3 counts from the beginning of an upload in parts, so an artifact may be as old as its upload took when it appears.
    """

    ref: ArtifactRef
    size_bytes: int
    age_seconds: float


@dataclass(frozen=True, kw_only=True)
class ArtifactPage:
    """Some artifacts of a tenant, and the place ``after`` which the next page begins: None when this was the last."""

    artifacts: Sequence[ListedArtifact]
    after: str | None


class ArtifactStorageBackend(Protocol):
    """A place for artifacts."""

    def store(self, ref: ArtifactRef, data: BinaryIO, *, only_if_absent: bool = False) -> StoredArtifact:
        """Store the stream whole or not at all; raises ``ArtifactSizeExceeded``, and ``ArtifactExists`` if asked to."""

    def put(self, ref: ArtifactRef, data: BinaryIO) -> str:
        """``store``, answering only the URI."""

    def open(self, ref: ArtifactRef) -> Iterator[bytes]:
        """The artifact in chunks; raises ``FileNotFoundError`` at the call, not at the first chunk.

        Where the content is found to be another than was stored, the last chunk is withheld and ``ArtifactCorrupt``
        raised in its place.
        """

    def get(self, ref: ArtifactRef) -> bytes:
        """The artifact in one piece; raises ``FileNotFoundError``."""

    def presign_url(self, ref: ArtifactRef, expires_in: int = 3600) -> str:
        """An address that gives the artifact to whoever holds it."""

    def delete(self, ref: ArtifactRef) -> None:
        """Remove the artifact; does nothing when it is not there."""

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 1000) -> ArtifactPage:
        """The artifacts of a tenant, a page of at most ``limit`` (1 to 1000) at a time; a page may be empty.

        Whoever goes on after each page sees each artifact once that is there from the first page to the last. What has
        no name of an artifact is passed over.

        Raises:
            ValueError: the tenant is no UUID in its canonical text, or the limit is none.
        """


class Meter:
    """Reads through, counts, hashes, and stops at the limit. Not seekable, so that a client streams it once."""

    def __init__(self, data: BinaryIO, max_bytes: int) -> None:
        self._data = data
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        chunk = self._data.read(size)
        self.size_bytes += len(chunk)
        if self.size_bytes > self._max_bytes:
            raise ArtifactSizeExceeded(self._max_bytes)
        self._hash.update(chunk)
        return chunk

    def stored_at(self, uri: str) -> StoredArtifact:
        """What was read so far, as stored there."""
        return StoredArtifact(uri=uri, size_bytes=self.size_bytes, sha256=self._hash.hexdigest())


def ref_at(path: str) -> ArtifactRef | None:
    """The artifact of a relative path; None where it is the path of none."""
    tenant_id, _, rest = path.partition("/")
    trace_id, _, name = rest.partition("/")
    artifact_id, _, ext = name.rpartition(".")
    try:
        return ArtifactRef(tenant_id, trace_id, artifact_id, ext)
    except ValueError:
        return None


def checked_page(tenant_id: str, limit: int) -> str:
    """The tenant whose page is asked for; raises ``ValueError`` as ``list`` does."""
    if not 1 <= limit <= LARGEST_PAGE:
        raise ValueError(f"limit must be 1 to {LARGEST_PAGE}, not {limit}")
    return ArtifactRef(tenant_id, "any", "any", "any").tenant_id


def chunks_of(stream: Any) -> Iterator[bytes]:
    """The stream in chunks; closed at the end or with the iterator."""
    with closing(stream):
        while chunk := stream.read(CHUNK):
            yield chunk


def verified(uri: str, chunks: Iterator[bytes], expected: Collection[str]) -> Iterator[bytes]:
    """The chunks, the last of them only when the SHA-256 of all is an expected one; else ``ArtifactCorrupt``."""
    digest = hashlib.sha256()
    last = b""
    for chunk in chunks:
        if last:
            yield last
        digest.update(chunk)
        last = chunk
    if digest.hexdigest() not in expected:
        raise ArtifactCorrupt(uri, expected=" or ".join(expected) or "nothing", found=digest.hexdigest())
    if last:
        yield last
