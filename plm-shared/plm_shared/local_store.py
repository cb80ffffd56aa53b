"""Artifacts in a local folder."""

from __future__ import annotations

import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from plm_shared.artifacts import (
    CHUNK,
    DEFAULT_MAX_BYTES,
    ArtifactExists,
    ArtifactPage,
    ArtifactRef,
    ListedArtifact,
    Meter,
    StoredArtifact,
    checked_page,
    chunks_of,
    ref_at,
    verified,
)

__all__ = ["LocalFilesystemBackend"]

_PARTIAL: Final = ".partial-"
_HASHES: Final = ".sha256"  # a tree beside the artifacts; no tenant's name starts with a dot


class LocalFilesystemBackend:
    """Artifacts in a folder, readable by this account only; a crash leaves the old content or the new, never a part.

    What a killed writer had written so far is removed with the next artifact of the same trace.

    The hash of each artifact is kept in a tree of its own and checked whenever the artifact is read.
    """

    def __init__(self, root: Path | str, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._root = Path(root).absolute()
        self._max_bytes = max_bytes
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def store(self, ref: ArtifactRef, data: BinaryIO, *, only_if_absent: bool = False) -> StoredArtifact:
        """Write beside the final place, flush to disk, then rename.

        Raises:
            ArtifactSizeExceeded: nothing was stored; an older version stands.
            ArtifactExists: it is there and was to be stored only if absent.
        """
        target = self._path(ref)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        meter = Meter(data, self._max_bytes)
        with _written(target.parent) as (file, partial):
            while chunk := meter.read(CHUNK):
                file.write(chunk)
            stored = meter.stored_at(target.as_uri())
            _flush(file)
            with _locked(target.parent):
                if only_if_absent and target.exists():
                    raise ArtifactExists(stored.uri)
                self._replace(ref, partial, target, stored.sha256)
        return stored

    def put(self, ref: ArtifactRef, data: BinaryIO) -> str:
        """``store``, answering only the ``file://`` URI."""
        return self.store(ref, data).uri

    def open(self, ref: ArtifactRef) -> Iterator[bytes]:
        """The file in chunks; closed at the end or with the iterator.

        Raises:
            FileNotFoundError: there is no such artifact.
            ArtifactCorrupt: in place of the last chunk.
        """
        path = self._path(ref)
        with _locked(path.parent):
            file = path.open("rb")
            expected = self._hashes(ref)
        return verified(path.as_uri(), chunks_of(file), expected)

    def get(self, ref: ArtifactRef) -> bytes:
        """The file's bytes; raises as ``open`` does."""
        return b"".join(self.open(ref))

    def presign_url(self, ref: ArtifactRef, expires_in: int = 3600) -> str:  # noqa: ARG002 - a file's address stays
        """The ``file://`` URI.

        Raises:
            FileNotFoundError: there is no such artifact.
        """
        return self._path(ref).resolve(strict=True).as_uri()

    def delete(self, ref: ArtifactRef) -> None:
        """Remove the file if it is there."""
        path = self._path(ref)
        with suppress(FileNotFoundError), _locked(path.parent):
            path.unlink(missing_ok=True)
            self._hash_path(ref).unlink(missing_ok=True)

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 1000) -> ArtifactPage:
        """The artifacts of a tenant, trace by trace in the order of their names.

        Raises:
            ValueError: the tenant is no UUID in its canonical text, or the limit is none.
        """
        folder = self._root / checked_page(tenant_id, limit)
        trace, _, name = (after or "").partition("/")
        found: list[ListedArtifact] = []
        for each in _names(folder, since=trace):
            for file in _names(folder / each, since=name if each == trace else ""):
                if (each, file) == (trace, name):
                    continue
                if len(found) == limit:
                    return ArtifactPage(artifacts=found, after=found[-1].ref.relative_path.partition("/")[2])
                found += _listed(folder / each / file, f"{tenant_id}/{each}/{file}")
        return ArtifactPage(artifacts=found, after=None)

    def _replace(self, ref: ArtifactRef, partial: Path, target: Path, sha256: str) -> None:
        """Old and new hash are both good while the content changes: a crash in between leaves a readable artifact."""
        self._remember(ref, [sha256, *(self._hashes(ref) if target.exists() else [])])
        partial.replace(target)
        _flush_folder(target.parent)
        self._remember(ref, [sha256])

    def _remember(self, ref: ArtifactRef, hashes: Sequence[str]) -> None:
        path = self._hash_path(ref)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _written(path.parent) as (file, partial):
            file.write("".join(f"{each}\n" for each in hashes).encode())
            _flush(file)
            partial.replace(path)
        _flush_folder(path.parent)

    def _hashes(self, ref: ArtifactRef) -> Sequence[str]:
        try:
            return self._hash_path(ref).read_text(encoding="ascii").split()
        except FileNotFoundError:
            return []

    def _path(self, ref: ArtifactRef) -> Path:
        return self._root / ref.relative_path

    def _hash_path(self, ref: ArtifactRef) -> Path:
        return self._root / _HASHES / ref.relative_path


def _names(folder: Path, *, since: str) -> Sequence[str]:
    """The names in a folder from `since` on, in order; none where there is no such folder."""
    try:
        return sorted(each.name for each in folder.iterdir() if each.name >= since)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _listed(path: Path, relative: str) -> Sequence[ListedArtifact]:
    """The artifact at a path, if there is one (still)."""
    ref = ref_at(relative)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return []
    if ref is None or not stat.S_ISREG(found.st_mode):
        return []
    return [ListedArtifact(ref=ref, size_bytes=found.st_size, age_seconds=time.time() - found.st_mtime)]


@contextmanager
def _written(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file of our own in the folder, locked; whatever is not renamed in the block is removed."""
    with _locked(folder):
        _remove_orphans(folder)
        partial = folder / f"{_PARTIAL}{uuid.uuid4().hex}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, partial
    finally:
        partial.unlink(missing_ok=True)


def _remove_orphans(folder: Path) -> None:
    """What writers left that were killed: their locks ended with them."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        with suppress(FileNotFoundError, BlockingIOError), partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in the folder, among all processes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
