"""The archive: a tenant's exports as pieces in an artifact store, each named by the checkpoint it goes on after.

So the pieces make a chain that is read without an index: the first goes on after checkpoint 0, and where one ends the
next begins. A piece is stored only where there is none, so of two that would store the same one does.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, BinaryIO
from uuid import UUID

from plm_shared.artifact_store import ArtifactExists, ArtifactRef, ArtifactStorageBackend, StoredArtifact, open_store

from plm_engine_core.control_plane.errors import InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.events.export import (
    MAX_LINE_BYTES,
    Exported,
    ExportReader,
    checkpoint_of_line,
    export,
)
from plm_engine_core.control_plane.events.pruning import prune_events
from plm_engine_core.control_plane.events.signing import PublicKeys
from plm_engine_core.control_plane.identity import SystemIdentities
from plm_engine_core.control_plane.sweeping import sweep_until_cancelled
from plm_engine_core.control_plane.vocabulary import SystemActor

if TYPE_CHECKING:
    from plm_engine_core.control_plane.storage.ports import CheckpointStore, Storage

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 << 20
"""A piece ends with the checkpoint that makes it longer than this."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One stored piece: the events and checkpoints from `after` + 1 up to `number`."""

    after: int
    number: int
    uri: str
    size_bytes: int
    sha256: str


class Archive:
    """The pieces of all tenants in one store."""

    def __init__(self, backend: ArtifactStorageBackend) -> None:
        self._backend = backend

    async def write(self, store: CheckpointStore, tenant_id: UUID, *, after: int) -> Piece | None:
        """Store the piece that goes on after a checkpoint, or find it stored already; None when nothing is after it.

        Raises:
            InvalidRequest: events that it would hold were pruned, or what is stored there is of another history.
            OSError, ValueError: the place refused it; nothing was stored.
        """
        with tempfile.TemporaryFile() as file:
            number = await export(store, tenant_id, file, after=after, limit_bytes=PIECE_BYTES)
            if number == after:
                return None
            file.seek(0)
            try:
                stored = await asyncio.to_thread(self._store, _place(tenant_id, after), file)
            except ArtifactExists:
                return await self._found(store, tenant_id, after)
        return Piece(after=after, number=number, uri=stored.uri, size_bytes=stored.size_bytes, sha256=stored.sha256)

    async def _found(self, store: CheckpointStore, tenant_id: UUID, after: int) -> Piece:
        """A piece that was stored and not recorded: its writer was ended in between, or another is recording it."""
        place = _place(tenant_id, after)
        with _as_os_error():
            data = await asyncio.to_thread(self._backend.get, place)
        last = checkpoint_of_line(tenant_id, data.rstrip(b"\n").rpartition(b"\n")[2])
        ours = list(await store.read(tenant_id, after=last.number - 1, limit=1)) if last is not None else []
        if last is None or ours != [last]:
            raise InvalidRequest(
                f"{place.relative_path} is in the archive and is no piece of this history; name another archive",
                field="archive",
            )
        with _as_os_error():
            uri = await asyncio.to_thread(self._backend.presign_url, place)
        digest = sha256(data).hexdigest()
        return Piece(after=after, number=last.number, uri=uri.partition("?")[0], size_bytes=len(data), sha256=digest)

    def _store(self, place: ArtifactRef, file: BinaryIO) -> StoredArtifact:
        with _as_os_error():
            return self._backend.store(place, file, only_if_absent=True)

    def read(self, tenant_id: UUID, keys: PublicKeys) -> Exported:
        """Check every piece of a tenant, in order, without a database; `problem` names what is wrong first.

        Raises:
            OSError: the place cannot be read.
        """
        reader = ExportReader(keys)
        while not reader.found.problem:
            after = reader.found.newest.number if reader.found.newest else 0
            try:
                with _as_os_error():
                    chunks = self._backend.open(_place(tenant_id, after))
            except FileNotFoundError:
                break
            try:
                reader.add(_lines(chunks), name=f"piece after checkpoint {after}")
            except OSError as error:
                reader.found.problem = f"piece after checkpoint {after}: {error}"
        return reader.found


class Archivist:
    """Keeps every tenant's archive up to its newest checkpoint, and prunes what its retention no longer asks for.

    A pass acts in each tenant as `system:archive` of `identities`; without any, nothing of that is recorded.
    """

    def __init__(
        self,
        storage: Storage,
        archive: Archive,
        *,
        every_seconds: float = 3600.0,
        identities: SystemIdentities | None = None,
    ) -> None:
        self._checkpoints = storage.checkpoints
        self._archive = archive
        self._every_seconds = every_seconds
        self._in_tenant = partial((identities or SystemIdentities(None)).acting, SystemActor.ARCHIVE)

    async def archive(self, tenant_id: UUID) -> list[Piece]:
        """Store what is signed and not stored yet, and record it."""
        pieces = []
        after = await self._checkpoints.archived(tenant_id)
        while (piece := await self._archive.write(self._checkpoints, tenant_id, after=after)) is not None:
            await self._checkpoints.record_piece(tenant_id, piece)
            pieces.append(piece)
            after = piece.number
        return pieces

    async def sweep(self) -> int:
        """One pass over all tenants; answers how many pieces were stored.

        All archives come first: however long a pruning takes, none is behind for it.
        """
        stored, archived = 0, []
        for tenant_id in await self._checkpoints.tenants():
            with _others_go_on(tenant_id, "archive"):
                async with self._in_tenant(tenant_id):
                    stored += len(await self.archive(tenant_id))
                archived.append(tenant_id)
        for tenant_id in archived:
            with _others_go_on(tenant_id, "retention"):
                async with self._in_tenant(tenant_id):
                    await prune_events(self._checkpoints, tenant_id, actor=SystemActor.ARCHIVE.value)
        return stored

    async def run(self) -> None:
        """Sweep until cancelled; a failed pass is logged, and the next one does what it left."""
        await sweep_until_cancelled(
            self.sweep, every_seconds=self._every_seconds, name="the pass over the archive", logger=logger
        )


def open_archive(address: str) -> Archive:
    """The archive in a folder, or below ``s3://bucket`` (``?endpoint=URL`` for another server than Amazon's).

    Credentials for S3 come from where boto3 looks for them, never from the address.

    Raises:
        InvalidRequest: the address is of another kind, its folder cannot be made, or what S3 needs is not installed.
    """
    try:
        if not address.strip():
            raise ValueError("its address is empty")  # noqa: TRY301  # said as all that is no place
        return Archive(open_store(address))
    except (OSError, ValueError, ImportError) as error:
        raise InvalidRequest(f"there is no archive: {error}", field="archive") from error


def _place(tenant_id: UUID, after: int) -> ArtifactRef:
    return ArtifactRef(str(tenant_id), "events", f"after-{after}", "jsonl")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of what comes in chunks; one that is too long for an export comes unfinished, and is refused there."""
    rest = b""
    with _as_os_error():
        for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
            if len(rest) > MAX_LINE_BYTES:
                break
    if rest:
        yield rest


@contextmanager
def _others_go_on(tenant_id: UUID, what: str) -> Iterator[None]:
    """A failure is logged, as one of a tenant's archive or retention."""
    try:
        yield
    except StorageUnavailable as error:
        logger.warning("the %s of tenant %s has to wait: %s", what, tenant_id, error)
    except Exception:  # whatever the store's client raises
        logger.exception("the %s of tenant %s could not be brought up; the others go on", what, tenant_id)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What a store's client raises of its own kinds is a failure of the place like any other."""
    try:
        yield
    except (ArtifactExists, OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"the artifact store failed: {error}") from error
