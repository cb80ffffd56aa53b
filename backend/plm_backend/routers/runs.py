"""Runs: create, look, cancel, follow."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Response
from plm_engine_core.control_plane import ArtifactRecord, RunRequest
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events import Event, run_stream
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.vocabulary import RunState
from plm_shared.idempotency import compute_content_hash
from sse_starlette import EventSourceResponse, ServerSentEvent

from plm_backend.artifacts import reference, row_of
from plm_backend.dependencies import Caller, Cursor, Limit, TheCaller, ThePlatform, decode_cursor, encode_cursor
from plm_backend.schemas import (
    FileInput,
    RunCreate,
    RunDetail,
    RunDocument,
    RunPage,
    budget_document,
    jsonable,
    run_document,
    step_document,
)
from plm_backend.wiring import Platform

router = APIRouter(prefix="/v1/runs", tags=["runs"])

_LOOK_AGAIN = 15.0  # seconds; a lost wake-up delays an event by this at most, and it is the heartbeat
_TERMINAL_EVENTS = {"run_succeeded", "run_failed", "run_cancelled"}


@router.post("", status_code=202, operation_id="createRun", response_model=RunDocument)
async def create_run(
    body: RunCreate,
    platform: ThePlatform,
    caller: TheCaller,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Any:
    """Create a run. The same `Idempotency-Key` with the same body answers the same run; with another body, 409."""
    plan = platform.agents.get(body.agent)
    run_id = new_id()
    inputs, records = await _inputs(platform, caller, body, plan.inputs)
    run, replayed = await platform.control_plane.create_run(
        RunRequest(
            tenant_id=caller.tenant_id,
            run_id=run_id,
            agent=plan.to_json(),
            input=inputs,
            trace_id=caller.trace.trace_id,
            budget=body.budget,
            artifacts=[row_of(record, run_id=run_id, trace_id=caller.trace.trace_id) for record in records],
            idempotency_key=idempotency_key,
            request_digest=compute_content_hash(body.model_dump(mode="json")),
        ),
        principal=caller.principal,
    )
    response.headers["Location"] = f"/v1/runs/{run.id}"
    if idempotency_key is not None:
        response.headers["Idempotency-Key"] = idempotency_key
        response.headers["Idempotent-Replayed"] = "true" if replayed else "false"
    return run_document(run)


@router.get("", operation_id="listRuns", response_model=RunPage)
async def list_runs(
    platform: ThePlatform,
    caller: TheCaller,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: RunState | None = None,
) -> Any:
    """Runs of the tenant, newest first."""
    runs = await platform.control_plane.storage.runs.list(
        caller.tenant_id, limit=limit + 1, before=decode_cursor(cursor), state=state
    )
    page = runs[:limit]
    following = encode_cursor(page[-1].created_at, page[-1].id) if len(runs) > limit else None
    return {"items": [run_document(run) for run in page], "next": following}


@router.get("/{run_id}", operation_id="getRun", response_model=RunDetail)
async def get_run(run_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """One run with its steps and budgets."""
    runs = platform.control_plane.storage.runs
    run = await runs.get(caller.tenant_id, run_id)
    return {
        **run_document(run),
        "steps": [step_document(step) for step in await runs.steps(caller.tenant_id, run_id)],
        "budgets": [budget_document(budget) for budget in await runs.budgets(caller.tenant_id, run_id)],
    }


@router.post("/{run_id}/cancel", operation_id="cancelRun", response_model=RunDocument)
async def cancel_run(run_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """Cancel a run; idempotent. A run that already ended otherwise answers 409."""
    return run_document(await platform.control_plane.cancel(caller.tenant_id, run_id, by=caller.principal))


@router.get("/{run_id}/mcrc", operation_id="getRunMcrc")
async def get_mcrc(run_id: UUID, platform: ThePlatform, caller: TheCaller) -> dict[str, Any]:
    """The run's row in `mcrc_v1_view`: quality, cost and counts, as the ledger has them."""
    return jsonable(await platform.control_plane.storage.runs.mcrc(caller.tenant_id, run_id))


@router.get("/{run_id}/events", operation_id="followRun", response_class=EventSourceResponse)
async def follow_run(
    run_id: UUID,
    platform: ThePlatform,
    caller: TheCaller,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """Server-sent events: every event of the run once, in order, from `Last-Event-ID` on, then the end.

    `progress` messages carry no id: they are news, not record.
    """
    await platform.control_plane.storage.runs.get(caller.tenant_id, run_id)
    after = _sequence(last_event_id)
    return EventSourceResponse(_follow(platform, caller.tenant_id, run_id, after), ping=15)


def _sequence(last_event_id: str | None) -> int:
    if last_event_id is None or not last_event_id.strip():
        return 0
    if not last_event_id.isdecimal() or len(last_event_id) > 18:  # digits of a bigint
        raise InvalidRequest(
            f"Last-Event-ID must be a number this stream gave, not {last_event_id!r}", field="Last-Event-ID"
        )
    return int(last_event_id)


async def _follow(platform: Platform, tenant_id: UUID, run_id: UUID, after: int) -> AsyncIterator[ServerSentEvent]:
    events = platform.control_plane.storage.events
    async with platform.hub.watch(tenant_id, run_id) as news:
        while True:
            while batch := await events.read(tenant_id, run_stream(run_id), after=after):
                for event in batch:
                    after = event.seq
                    yield _sse(event)
                    if event.kind in _TERMINAL_EVENTS:
                        return
            if (await platform.control_plane.storage.runs.get(tenant_id, run_id)).finished:
                if await events.read(tenant_id, run_stream(run_id), after=after, limit=1):
                    continue
                return
            try:
                update = await asyncio.wait_for(news.get(), _LOOK_AGAIN)
            except TimeoutError:
                continue
            if "progress" in update:
                yield ServerSentEvent(event="progress", data=json.dumps(update["progress"]))


def _sse(event: Event) -> ServerSentEvent:
    document = {
        "seq": event.seq,
        "kind": event.kind,
        "actor": event.actor,
        "occurred_at": event.occurred_at.isoformat(),
        "hash": event.hash.hex(),
        "payload": event.data,
    }
    return ServerSentEvent(id=str(event.seq), event=event.kind, data=json.dumps(document))


async def _inputs(
    platform: Platform, caller: Caller, body: RunCreate, declared: Any
) -> tuple[dict[str, Any], list[ArtifactRecord]]:
    """The run's inputs, with every given file stored and referenced."""
    unknown = sorted((body.inputs.keys() | body.files.keys()) - declared.keys())
    if unknown:
        raise InvalidRequest(
            f"agent {body.agent} has no input {', '.join(unknown)}; it takes {', '.join(sorted(declared))}",
            field=f"inputs.{unknown[0]}",
        )
    values: dict[str, Any] = {}
    for name, spec in declared.items():
        is_file = spec.type == "file"
        if is_file != (name in body.files) and (name in body.inputs or name in body.files):
            raise InvalidRequest(f"give {name} under {'files' if is_file else 'inputs'}", field=f"inputs.{name}")
        if not is_file:
            if name not in body.inputs and spec.default is None:
                raise InvalidRequest(f"agent {body.agent} needs the input {name}", field=f"inputs.{name}")
            values[name] = _typed(name, spec.type, body.inputs.get(name, spec.default))
        elif name not in body.files:
            raise InvalidRequest(f"agent {body.agent} needs the file {name}", field=f"files.{name}")
    records = []
    for name, given in body.files.items():
        record = await platform.artifacts.store(
            caller.tenant_id,
            caller.trace.trace_id,
            name=given.name.replace("/", "_").replace("\\", "_"),
            mime_type=given.mime_type,
            data=_bytes(name, given),
        )
        records.append(record)
        values[name] = reference(record)
    return values, records


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


def _typed(name: str, kind: str, value: Any) -> Any:
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise InvalidRequest(f"{name} must be of type {kind}, not {type(value).__name__}", field=f"inputs.{name}")
    return value


def _bytes(name: str, given: FileInput) -> bytes:
    if (given.text is None) == (given.base64 is None):
        raise InvalidRequest(f"give either 'text' or 'base64' of the file {name}", field=f"files.{name}")
    try:
        return given.text.encode() if given.text is not None else base64.b64decode(given.base64 or "", validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InvalidRequest(
            f"the content of the file {name} cannot be read: {error}", field=f"files.{name}"
        ) from error
