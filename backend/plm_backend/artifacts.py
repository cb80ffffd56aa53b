"""Artifacts: files that runs take in and leave behind, referenced in JSON by id and content hash."""

from __future__ import annotations

import asyncio
import io
import mimetypes
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane import ArtifactRecord
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.runs.run import ArtifactRow
from plm_shared.artifact_store import ArtifactRef, ArtifactStorageBackend

REFERENCE = "$artifact"


class Artifacts:
    """Stores and fetches the bytes behind artifact references."""

    def __init__(self, backend: ArtifactStorageBackend, *, name: str) -> None:
        self._backend = backend
        self._name = name

    async def store(self, tenant_id: UUID, trace_id: str, *, name: str, mime_type: str, data: bytes) -> ArtifactRecord:
        """Put the bytes in the store; the record still has to be committed with whatever they belong to."""
        identifier = new_id()
        place = _place(tenant_id, trace_id, identifier, _extension(name, mime_type))
        stored = await asyncio.to_thread(self._backend.store, place, io.BytesIO(data))
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
            await asyncio.to_thread(self._backend.delete, place)

    async def fetch(self, tenant_id: UUID, row: ArtifactRow) -> bytes:
        """The bytes of a recorded artifact.

        Raises:
            FileNotFoundError: the store no longer has it.
        """
        place = _place(tenant_id, row.trace_id, row.id, _suffix(row.storage_uri))
        return await asyncio.to_thread(self._backend.get, place)


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
