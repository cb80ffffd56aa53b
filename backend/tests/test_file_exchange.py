"""Files at the border of a call: an output is in the store as a whole, or nothing of it is."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest
from plm_backend.artifacts import Artifacts
from plm_backend.file_exchange import FileExchange
from plm_engine_core.agent_runtime import Call
from plm_engine_core.control_plane import Outcome
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CostBound
from plm_engine_core.control_plane.vocabulary import CapabilityMode, OutcomeStatus
from plm_shared.artifact_store import LocalFilesystemBackend
from plugin_substrate.interface import OutputFile

ROOM = 100  # bytes of one file that the store takes


def a_call() -> Call:
    return Call(
        tenant_id=new_id(),
        run_id=new_id(),
        step_id="s",
        step_key="r/0",
        capability=CapabilityDescriptor(
            id="file.make",
            description="make files",
            mode=CapabilityMode.READ,
            plugin="files",
            cost=CostBound(max_eur=Decimal(0)),
        ),
        resource="r",
        arguments={},
        traceparent="",
        trace_id="0" * 31 + "1",
        begin=cast("Any", None),
    )


def made(*sizes: int) -> Outcome:
    files = [OutputFile(name=f"{size}.txt", mime_type="text/plain", data=b"x" * size) for size in sizes]
    return Outcome(status=OutcomeStatus.SUCCEEDED, output={"files": files})


def kept(folder: Path) -> list[int]:
    return sorted(path.stat().st_size for path in folder.rglob("*.txt") if ".sha256" not in path.parts)


async def test_an_output_that_cannot_be_stored_as_a_whole_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    artifacts = Artifacts(LocalFilesystemBackend(tmp_path, max_bytes=ROOM), name="local")
    exchange = FileExchange(artifacts=artifacts, runs=cast("Any", None))
    whole = await exchange.outward(a_call(), made(1, 2))
    assert (len(whole.artifacts), kept(tmp_path)) == (2, [1, 2])
    with pytest.raises(ValueError, match="100"):
        await exchange.outward(a_call(), made(3, 4, ROOM + 1, 5))
    assert kept(tmp_path) == [1, 2]
