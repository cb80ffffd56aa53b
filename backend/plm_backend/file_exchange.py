"""Files at the border of a call: references become files on the way in, files become references on the way out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from plm_engine_core.agent_runtime import Call
from plm_engine_core.control_plane import ArtifactRecord, Outcome
from plm_engine_core.control_plane.storage.ports import RunStore
from plugin_substrate.interface import InputFile, OutputFile

from plm_backend.artifacts import REFERENCE, Artifacts, is_reference, reference

logger = logging.getLogger(__name__)


class FileExchange:
    """A call sees the files of its own run, as they were when they were decided upon, and no others."""

    def __init__(self, *, artifacts: Artifacts, runs: RunStore) -> None:
        self._artifacts = artifacts
        self._runs = runs

    async def inward(self, call: Call) -> dict[str, Any]:
        """The arguments with every artifact reference replaced by its file.

        Raises:
            ValueError: a reference is malformed, of another run, or its content is not what was decided upon.
            NotFound: no such artifact in this tenant.
            FileNotFoundError: the store no longer has it.
        """
        return {name: await self._file_in(call, value) for name, value in call.arguments.items()}

    async def outward(self, call: Call, outcome: Outcome) -> Outcome:
        """The outcome with every file of its output stored and referenced; where one cannot be, none stays stored.

        Raises:
            OSError: the store failed; ValueError: a file is too large for it.
        """
        stored: list[ArtifactRecord] = []
        try:
            output = await self._file_out(call, outcome.output, stored)
        except (OSError, ValueError):
            await self._forget(call, stored)
            raise
        return replace(outcome, output=output, artifacts=tuple(stored))

    async def _forget(self, call: Call, stored: list[ArtifactRecord]) -> None:
        """Remove the files of an output that no record will name."""
        try:
            await self._artifacts.discard(call.tenant_id, call.trace_id, stored)
        except OSError:
            logger.warning(
                "files of a lost output stay in the store", extra={"run_id": str(call.run_id)}, exc_info=True
            )

    async def _file_in(self, call: Call, value: Any) -> Any:
        if is_reference(value):
            return await self._load(call, value)
        if isinstance(value, Mapping):
            return {key: await self._file_in(call, each) for key, each in value.items()}
        if isinstance(value, list):
            return [await self._file_in(call, each) for each in value]
        return value

    async def _load(self, call: Call, value: Mapping[str, Any]) -> InputFile:
        row = await self._runs.artifact(call.tenant_id, UUID(value[REFERENCE]))
        if row.run_id != call.run_id:
            raise ValueError(f"artifact {row.id} belongs to another run")
        data = await self._artifacts.fetch(call.tenant_id, row)
        if hashlib.sha256(data).hexdigest() != value.get("sha256"):
            raise ValueError(f"artifact {row.id} is not what was decided upon: its content hash differs")
        return InputFile(name=str(value.get("name", row.id)), mime_type=row.mime_type, data=data)

    async def _file_out(self, call: Call, value: Any, stored: list[ArtifactRecord]) -> Any:
        if isinstance(value, OutputFile):
            record = await self._artifacts.store(
                call.tenant_id, call.trace_id, name=value.name, mime_type=value.mime_type, data=value.data
            )
            stored.append(record)
            return reference(record)
        if isinstance(value, Mapping):
            return {key: await self._file_out(call, each, stored) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [await self._file_out(call, each, stored) for each in value]
        return value
