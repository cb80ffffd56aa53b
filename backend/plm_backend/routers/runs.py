"""Runs: create, look, cancel, follow."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Response
from plm_engine_core.control_plane import RunRequest
from plm_engine_core.control_plane.errors import ControlPlaneError, StorageUnavailable
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.vocabulary import RunState
from plm_shared.idempotency import compute_content_hash
from sse_starlette import EventSourceResponse

from plm_backend.artifacts import reference, row_of
from plm_backend.dependencies import TheCaller, ThePlatform, TheWindow
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.run_events import HEARTBEAT_SECONDS, follow, resume_after
from plm_backend.run_inputs import check_inputs
from plm_backend.schemas import (
    RunCreate,
    RunDetail,
    RunDocument,
    RunPage,
    budget_document,
    jsonable,
    principal_document,
    run_document,
    step_document,
)

router = APIRouter(prefix="/v1/runs", tags=["runs"], route_class=JsonRoute)


@router.post(
    "",
    status_code=202,
    operation_id="createRun",
    response_model=RunDocument,
    responses=documented(*DOORS, *BODIES, 409),
)
async def create_run(
    body: RunCreate,
    platform: ThePlatform,
    caller: TheCaller,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Any:
    """Create a run. The same `Idempotency-Key` with the same body answers the same run; with another body, 409."""
    plan = platform.agents.get(body.agent)
    given = check_inputs(plan, body)
    run_id, trace_id = new_id(), caller.trace.trace_id
    records = {
        name: await platform.artifacts.store(
            caller.tenant_id, trace_id, name=file.name, mime_type=file.mime_type, data=file.data
        )
        for name, file in given.files.items()
    }
    try:
        run, replayed = await platform.control_plane.create_run(
            RunRequest(
                tenant_id=caller.tenant_id,
                run_id=run_id,
                agent=plan.to_json(),
                input={**given.values, **{name: reference(record) for name, record in records.items()}},
                trace_id=trace_id,
                budget=body.budget,
                run_group_id=body.run_group_id,
                artifacts=[row_of(record, run_id=run_id, trace_id=trace_id) for record in records.values()],
                idempotency_key=idempotency_key,
                request_digest=compute_content_hash(body.asked),
            ),
            principal=caller.principal,
        )
    except StorageUnavailable:
        raise  # it may have been committed all the same, so the files stay
    except ControlPlaneError:
        await platform.artifacts.discard(caller.tenant_id, trace_id, records.values())
        raise
    if replayed:
        await platform.artifacts.discard(caller.tenant_id, trace_id, records.values())
    response.headers["Location"] = f"/v1/runs/{run.id}"
    if idempotency_key is not None:
        response.headers["Idempotency-Key"] = idempotency_key
        response.headers["Idempotent-Replayed"] = "true" if replayed else "false"
    return run_document(run)


@router.get("", operation_id="listRuns", response_model=RunPage, responses=documented(*DOORS))
async def list_runs(platform: ThePlatform, caller: TheCaller, window: TheWindow, state: RunState | None = None) -> Any:
    """Runs of the tenant, newest first."""
    runs = await platform.control_plane.storage.runs.list(
        caller.tenant_id, limit=window.wanted, before=window.after, state=state
    )
    return window.page(runs, run_document)


@router.get("/{run_id}", operation_id="getRun", response_model=RunDetail, responses=documented(*DOORS, 404))
async def get_run(run_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """One run with its steps and budgets."""
    runs = platform.control_plane.storage.runs
    run = await runs.get(caller.tenant_id, run_id)
    return {
        **run_document(run),
        "principal": principal_document(run.principal),
        "steps": [step_document(step) for step in await runs.steps(caller.tenant_id, run_id)],
        "budgets": [budget_document(budget) for budget in await runs.budgets(caller.tenant_id, run_id)],
    }


@router.post(
    "/{run_id}/cancel", operation_id="cancelRun", response_model=RunDocument, responses=documented(*DOORS, 404, 409)
)
async def cancel_run(run_id: UUID, platform: ThePlatform, caller: TheCaller) -> Any:
    """Cancel a run; idempotent. A run that already ended otherwise answers 409."""
    return run_document(await platform.control_plane.cancel(caller.tenant_id, run_id, by=caller.principal))


@router.get("/{run_id}/mcrc", operation_id="getRunMcrc", responses=documented(*DOORS, 404))
async def get_mcrc(run_id: UUID, platform: ThePlatform, caller: TheCaller) -> dict[str, Any]:
    """The run's row in `mcrc_v1_view`: quality, cost and counts, as the ledger has them."""
    return jsonable(await platform.control_plane.storage.runs.mcrc(caller.tenant_id, run_id))


@router.get(
    "/{run_id}/events",
    operation_id="followRun",
    response_class=EventSourceResponse,
    responses=documented(*DOORS, 404),
)
async def follow_run(
    run_id: UUID,
    platform: ThePlatform,
    caller: TheCaller,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """Server-sent events: every event of the run once, in order, from `Last-Event-ID` on, then the end.

    `progress` messages carry no id: they are news, not record. Going away never cancels the run.
    The stream closes early when the token that opened it expires.
    """
    after = await resume_after(platform, caller.tenant_id, run_id, last_event_id)
    return EventSourceResponse(
        follow(platform, caller.tenant_id, run_id, after=after, until=caller.until),
        ping=HEARTBEAT_SECONDS,
        send_timeout=60,
    )
