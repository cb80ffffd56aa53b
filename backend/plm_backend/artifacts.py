"""Artifacts: files that runs take in and leave behind, referenced in JSON by id and content hash."""

from __future__ import annotations

import asyncio
import io
import mimetypes
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar
from uuid import UUID

from plm_engine_core.control_plane import ArtifactRecord
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.runs.run import ArtifactRow
from plm_shared.artifact_store import ArtifactCorrupt, ArtifactRef, ArtifactStorageBackend

REFERENCE = "$artifact"
T = TypeVar("T")


class ArtifactStoreUnavailable(OSError):
    """The store did not take, hand out or remove a file, for a reason that is not in the file."""


class Artifacts:
    """Stores and fetches the bytes behind artifact references; `name` is the kind of the store, recorded with each.

    Raises, wherever it asks the store:
        ArtifactStoreUnavailable: the store failed.
    """

    def __init__(self, backend: ArtifactStorageBackend, *, name: str) -> None:
        self._backend = backend
        self._name = name

    async def store(self, tenant_id: UUID, trace_id: str, *, name: str, mime_type: str, data: bytes) -> ArtifactRecord:
        """Put the bytes in the store; the record still has to be committed with whatever they belong to."""
        identifier = new_id()
        place = _place(tenant_id, trace_id, identifier, _extension(name, mime_type))
        stored = await _ask(self._backend.store, place, io.BytesIO(data))
        return ArtifactRecord(
            id=identifier,
            name=name,
            mime_type=mime_type,
            size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            backend=self._name,
            storage_uri=stored.uri,
        )

    async def discard(self, tenant_id: UUID, trace_id: str, records: Iterable[ArtifactRecord]) -> None:
        """Remove files that came to belong to nothing."""
        for record in records:
            place = _place(tenant_id, trace_id, record.id, _suffix(record.storage_uri))
            await _ask(self._backend.delete, place)

    async def fetch(self, tenant_id: UUID, row: ArtifactRow) -> bytes:
        """The bytes of a recorded artifact.

        Raises:
            FileNotFoundError: the store no longer has it, or it is in a store of another kind.
        """
        if row.backend != self._name:
            raise FileNotFoundError(f"artifact {row.id} is in a store of kind {row.backend!r}, not {self._name!r}")
        place = _place(tenant_id, row.trace_id, row.id, _suffix(row.storage_uri))
        return await _ask(self._backend.get, place)


async def _ask(ask: Callable[..., T], *arguments: Any) -> T:
    try:
        return await asyncio.to_thread(ask, *arguments)
    except (FileNotFoundError, ArtifactCorrupt, ValueError):
        raise
    except Exception as error:  # whatever the store's client raises
        raise ArtifactStoreUnavailable(f"the artifact store failed: {error}") from error


def reference(record: ArtifactRecord) -> dict[str, Any]:
    """How a file stands in inputs, arguments and outputs."""
    return {
        REFERENCE: str(record.id),
        "name": record.name,
        "mime_type": record.mime_type,
        "size_bytes": record.size_bytes,
        "sha256": record.sha256,
    }


def is_reference(value: Any) -> bool:
    """Whether a JSON value stands for a file."""
    return isinstance(value, Mapping) and isinstance(value.get(REFERENCE), str)


def row_of(record: ArtifactRecord, *, run_id: UUID, trace_id: str) -> ArtifactRow:
    """The record as a row to be inserted with its run."""
    return ArtifactRow(
        id=record.id,
        run_id=run_id,
        trace_id=trace_id,
        mime_type=record.mime_type,
        size_bytes=record.size_bytes,
        backend=record.backend,
        storage_uri=record.storage_uri,
    )


def _place(tenant_id: UUID, trace_id: str, identifier: UUID, extension: str) -> ArtifactRef:
    return ArtifactRef(tenant_id=str(tenant_id), trace_id=trace_id, artifact_id=str(identifier), ext=extension)


def _suffix(uri: str) -> str:
    return PurePosixPath(uri).suffix.lstrip(".")


def _extension(name: str, mime_type: str) -> str:
    """A short extension of letters and digits, whatever the name tries."""
    given = PurePosixPath(name).suffix.lstrip(".").lower()
    guessed = (mimetypes.guess_extension(mime_type.partition(";")[0]) or ".bin").lstrip(".")
    return given if given.isascii() and given.isalnum() and len(given) <= 10 else guessed
