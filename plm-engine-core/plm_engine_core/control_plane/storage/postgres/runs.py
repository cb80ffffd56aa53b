"""Runs and their steps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg import AsyncServerCursor

from plm_engine_core.control_plane.errors import Conflict, IdempotencyConflict, NotFound, StorageUnavailable
from plm_engine_core.control_plane.events.event import TENANT_STREAM, run_stream
from plm_engine_core.control_plane.limits.budgets import Budget
from plm_engine_core.control_plane.policy.gates import GateRefusal
from plm_engine_core.control_plane.policy.replay import Attempt
from plm_engine_core.control_plane.runs.run import ArtifactRow, NewRun, Run, Step
from plm_engine_core.control_plane.runs.states import sources_of
from plm_engine_core.control_plane.storage.commands import creation_json, refusal_json
from plm_engine_core.control_plane.storage.ports import MarkCommand
from plm_engine_core.control_plane.storage.postgres.gateway import LONGEST_WALK_SECONDS, Session, jsonb
from plm_engine_core.control_plane.storage.postgres.leases import PostgresLeases, close_books, queue_again
from plm_engine_core.control_plane.storage.postgres.markers import earlier_marker, put_marker
from plm_engine_core.control_plane.storage.rows import budget_row, run_row, step_row
from plm_engine_core.control_plane.vocabulary import (
    PROVIDE_INPUT,
    BudgetScope,
    EventKind,
    RunKind,
    RunState,
    StepState,
)

_ATTEMPTS = 100  # in one batch: about as many as a socket holds, so that the server need not wait to be read
_CREATE_OPERATION = "runs.create"
# The tenant's row is what all its admissions wait for: it is locked only where its limit is not that of the policy, and
# left alone by a node that has not heard of the active one.
_SET_LIMIT = """
WITH changed AS (
    UPDATE budgets SET limit_amount = %(limit)s
    WHERE tenant_id = %(tenant)s AND scope_kind = %(scope)s AND scope_id = %(scope_id)s AND unit = %(unit)s
      AND period = 'total' AND starts_at = to_timestamp(0) AND NOT pinned AND limit_amount <> %(limit)s
      AND COALESCE((SELECT digest FROM policy_activations WHERE role = 'active' ORDER BY number DESC LIMIT 1)
                   = %(policy)s, true))
INSERT INTO budgets (tenant_id, scope_kind, scope_id, unit, limit_amount)
VALUES (%(tenant)s, %(scope)s, %(scope_id)s, %(unit)s, %(limit)s) ON CONFLICT DO NOTHING
"""
_GET = "SELECT * FROM run_states WHERE tenant_id = %s AND run_id = %s"
_GET_LOCKED = "SELECT * FROM run_states WHERE tenant_id = %s AND run_id = %s FOR UPDATE"


class PostgresRuns(PostgresLeases):
    """Runs in PostgreSQL. Every change is one conditional statement plus its event, in one transaction."""

    async def create(self, new: NewRun) -> tuple[Run, bool]:
        """Create a run, its budgets, its input artifacts and its drive job in one commit."""
        async with self._gateway.transaction(new.tenant_id) as connection:
            if new.idempotency_key is not None:
                earlier = await self._claim_key(connection, new)
                if earlier is not None:
                    return await _get(connection, new.tenant_id, earlier), True
            await self._insert(connection, new)
            await self._gateway.append(
                connection,
                new.tenant_id,
                run_stream(new.run_id),
                EventKind.RUN_CREATED,
                new.principal.actor,
                creation_json(new),
            )
            if new.kind is RunKind.HOSTED:
                await self._delivery.enqueue(connection, new.tenant_id, new.run_id)
            return await _get(connection, new.tenant_id, new.run_id), False

    async def refuse(self, new: NewRun, refusal: GateRefusal) -> Run | None:
        """Record that a run is not created, unless its key made one before."""
        async with self._gateway.transaction(new.tenant_id) as connection:
            earlier = await _run_of_key(connection, new) if new.idempotency_key is not None else None
            if earlier is not None:
                return await _get(connection, new.tenant_id, earlier)
            told = refusal_json(new, refusal)
            await self._gateway.append(
                connection, new.tenant_id, TENANT_STREAM, EventKind.RUN_REFUSED, new.principal.actor, told
            )
            return None

    async def _claim_key(self, connection: Session, new: NewRun) -> UUID | None:
        """Take the key; when an earlier creation has it, the run that it made.

        Raises:
            IdempotencyConflict: that one was of another request.
            StorageUnavailable: its record expired just now.
        """
        claimed = await connection.execute(
            "INSERT INTO idempotency_records (tenant_id, operation, command_id, digest, result) "
            "VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [
                new.tenant_id,
                _CREATE_OPERATION,
                new.idempotency_key,
                new.request_digest,
                jsonb({"run_id": str(new.run_id)}, root="result"),
            ],
        )
        if claimed.rowcount:
            return None
        earlier = await _run_of_key(connection, new)
        if earlier is None:
            raise StorageUnavailable(
                f"what Idempotency-Key {new.idempotency_key!r} stood for expired just now; send the request again"
            )
        return earlier

    async def _insert(self, connection: Session, new: NewRun) -> None:
        await connection.execute(
            "INSERT INTO runs (id, tenant_id, actor_kind) VALUES (%s, %s, %s)",
            [new.run_id, new.tenant_id, new.principal.actor_kind],
        )
        await connection.execute(
            "INSERT INTO run_states (tenant_id, run_id, kind, state, agent, input, principal, policy_digest, trace_id, "
            "root_span_id, agent_id, run_group_id, user_id, team, idempotency_key) "
            "VALUES (%s, %s, %s, 'queued', %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                new.tenant_id,
                new.run_id,
                new.kind.value,
                jsonb(dict(new.agent), root="agent"),
                jsonb(dict(new.input), root="input"),
                jsonb(new.principal.to_json(), root="principal"),
                new.policy_digest,
                new.trace_id,
                new.root_span_id,
                new.subjects.agent_id,
                new.subjects.run_group_id,
                new.subjects.user_id,
                new.subjects.team,
                new.idempotency_key,
            ],
        )
        for scope, scope_id, limits in (
            (BudgetScope.RUN, new.run_id, new.budget),
            (BudgetScope.TENANT, new.tenant_id, new.tenant_budget),
        ):
            for unit, limit in sorted(limits.items()):  # the order of locks that `BudgetPlan` has
                named = {"tenant": new.tenant_id, "scope": scope.value, "scope_id": scope_id, "unit": str(unit)}
                await connection.execute(_SET_LIMIT, {**named, "limit": limit, "policy": new.policy_digest})
        for artifact in new.artifacts:
            await connection.execute(
                "INSERT INTO artifacts (id, tenant_id, trace_id, run_id, mime_type, size_bytes, backend, storage_uri) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                [
                    artifact.id,
                    new.tenant_id,
                    artifact.trace_id,
                    new.run_id,
                    artifact.mime_type,
                    artifact.size_bytes,
                    artifact.backend,
                    artifact.storage_uri,
                ],
            )

    async def now(self) -> datetime:
        """The time by the database's clock."""
        async with self._gateway.connection() as connection:
            cursor = await connection.execute("SELECT clock_timestamp() AS at")
            row = await cursor.fetchone()
            assert row is not None  # noqa: S101  # a function answers
            at: datetime = row["at"]
            return at

    async def get(self, tenant_id: UUID, run_id: UUID) -> Run:
        """One run."""
        async with self._gateway.transaction(tenant_id) as connection:
            return await _get(connection, tenant_id, run_id)

    async def list(
        self, tenant_id: UUID, *, limit: int, before: tuple[datetime, UUID] | None, state: RunState | None
    ) -> Sequence[Run]:
        """Newest first."""
        at, run_id = before or (None, None)
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM run_states WHERE tenant_id = %(tenant)s "
                "AND (%(at)s::timestamptz IS NULL OR (created_at, run_id) < (%(at)s, %(run)s::uuid)) "
                "AND (%(state)s::text IS NULL OR state = %(state)s) "
                "ORDER BY created_at DESC, run_id DESC LIMIT %(limit)s",
                {"tenant": tenant_id, "at": at, "run": run_id, "state": state and state.value, "limit": limit},
            )
            return [run_row(row) for row in await cursor.fetchall()]

    async def steps(self, tenant_id: UUID, run_id: UUID, *, since: int = 0) -> Sequence[Step]:
        """Every attempt of every step from index `since` on, in order."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT s.*, g.span_id, g.expires_at AS grant_expires_at FROM run_steps AS s "
                "LEFT JOIN grants AS g ON g.tenant_id = s.tenant_id AND g.id = s.grant_id "
                "WHERE s.tenant_id = %s AND s.run_id = %s AND s.step_index >= %s ORDER BY s.step_index, s.attempt",
                [tenant_id, run_id, since],
            )
            return [step_row(row) for row in await cursor.fetchall()]

    async def attempts(self, tenant_id: UUID, *, since: datetime) -> AsyncIterator[Sequence[Attempt]]:
        """Every proposal of the tenant that was decided since then, as of one instant, in batches, oldest run first."""
        async with (
            self._gateway.transaction(tenant_id, longest=LONGEST_WALK_SECONDS) as connection,
            connection.cursor(name="every_attempt") as cursor,
        ):
            await cursor.execute(
                "SELECT s.run_id::text, s.step_index, s.attempt, s.capability, s.resource, s.arguments, s.decision, "
                "CASE WHEN g.state <> 'settled' THEN NULL WHEN g.reserved IS NULL "
                "THEN engine_spent_v2(g.tenant_id, g.id) ELSE engine_spent_v4(g.reserved, g.charged) END AS spent "
                "FROM run_steps AS s LEFT JOIN grants AS g ON g.tenant_id = s.tenant_id AND g.id = s.grant_id "
                "WHERE s.tenant_id = %s AND s.created_at >= %s AND s.capability <> %s "
                "ORDER BY s.run_id, s.step_index, s.attempt",
                [tenant_id, since, PROVIDE_INPUT],
            )
            async for rows in _read_ahead(cursor, _ATTEMPTS):
                yield [Attempt(**row) for row in rows]

    async def budgets(self, tenant_id: UUID, run_id: UUID) -> Sequence[Budget]:
        """The budgets a call of this run draws on."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT b.* FROM run_states AS r JOIN budgets AS b ON b.tenant_id = r.tenant_id "
                "AND engine_window_runs_v1(clock_timestamp(), b.period, b.starts_at, b.ends_at) AND CASE b.scope_kind "
                "WHEN 'run' THEN b.scope_id = r.run_id WHEN 'run_group' THEN b.scope_id = r.run_group_id "
                "WHEN 'user' THEN b.scope_id = r.user_id WHEN 'tenant' THEN true "
                "WHEN 'agent' THEN b.subject = r.agent_id WHEN 'team' THEN b.subject = r.team END "
                "WHERE r.tenant_id = %s AND r.run_id = %s",
                [tenant_id, run_id],
            )
            found = [budget_row(row) for row in await cursor.fetchall()]
            return sorted(found, key=lambda each: each.width)

    async def request_cancel(self, tenant_id: UUID, run_id: UUID, *, actor: str) -> Run:
        """Cancel at once where nobody drives the run, else ask its worker; asking twice answers the same."""
        async with self._gateway.transaction(tenant_id) as connection:
            run = await _get(connection, tenant_id, run_id, lock=True)
            if run.state is RunState.CANCELLED or (run.state is RunState.RUNNING and run.cancel_requested):
                return run
            if run.finished:
                raise Conflict(f"run {run_id} is already {run.state.value}", reason="impossible_transition")
            if run.state is RunState.OUTCOME_UNKNOWN:
                raise Conflict(
                    f"the outcome of a step of run {run_id} is unknown; reconcile it first", reason="outcome_unknown"
                )
            if run.state is RunState.RUNNING:
                await connection.execute(
                    "UPDATE run_states SET cancel_requested_at = clock_timestamp(), updated_at = clock_timestamp() "
                    "WHERE tenant_id = %s AND run_id = %s",
                    [tenant_id, run_id],
                )
                kind = EventKind.RUN_CANCEL_REQUESTED
            else:
                await self._cancel_parked(connection, tenant_id, run_id)
                kind = EventKind.RUN_CANCELLED
            await self._gateway.append(
                connection, tenant_id, run_stream(run_id), kind, actor, {"was": run.state.value, "by": actor}
            )
            if run.state is RunState.RUNNING:
                # A dead worker's run is taken over and then finds the request.
                await self._delivery.enqueue(connection, tenant_id, run_id)
            return await _get(connection, tenant_id, run_id)

    async def _cancel_parked(self, connection: Session, tenant_id: UUID, run_id: UUID) -> None:
        await connection.execute(
            "UPDATE run_states SET state = 'cancelled', reason = 'cancelled', message = 'cancelled on request', "
            "fencing_token = fencing_token + 1, cancel_requested_at = clock_timestamp(), "
            "finished_at = clock_timestamp(), updated_at = clock_timestamp() "
            "WHERE tenant_id = %s AND run_id = %s AND state = ANY(%s)",
            [tenant_id, run_id, [state.value for state in sources_of(RunState.CANCELLED)]],
        )
        await connection.execute(
            "UPDATE run_steps SET state = 'cancelled', finished_at = clock_timestamp() "
            "WHERE tenant_id = %s AND run_id = %s AND state = 'awaiting_approval'",
            [tenant_id, run_id],
        )
        await close_books(connection, tenant_id, run_id)

    async def mark(self, command: MarkCommand) -> int:
        """Append a marker to the stream of a run that has not ended, once for each command id; answers its sequence."""
        async with self._gateway.transaction(command.tenant_id) as connection:
            earlier = await earlier_marker(connection, command)
            if earlier is not None:
                return earlier
            run = await _get(connection, command.tenant_id, command.run_id, lock=True)
            if run.finished:
                raise Conflict(f"run {run.id} is already {run.state.value}", reason="impossible_transition")
            return await put_marker(connection, self._gateway, command)

    async def reconcile(self, tenant_id: UUID, run_id: UUID, *, happened: bool, output: Any, actor: str) -> Run:
        """Record what became of an unknown effect, and queue the run again."""
        state = StepState.SUCCEEDED if happened else StepState.NOT_STARTED
        async with self._gateway.transaction(tenant_id) as connection:
            run = await _get(connection, tenant_id, run_id, lock=True)
            if run.state is not RunState.OUTCOME_UNKNOWN:
                raise Conflict(
                    f"run {run_id} is {run.state.value}; only a run in outcome_unknown can be reconciled",
                    reason="impossible_transition",
                )
            cursor = await connection.execute(
                "UPDATE run_steps SET state = %s, evidence = 'reported', output = %s, finished_at = clock_timestamp() "
                "WHERE tenant_id = %s AND run_id = %s AND state = 'outcome_unknown' RETURNING step_index, attempt",
                [state.value, jsonb(output, root="output") if output is not None else None, tenant_id, run_id],
            )
            reconciled = [dict(row) for row in await cursor.fetchall()]
            await queue_again(connection, tenant_id, run_id, was=RunState.OUTCOME_UNKNOWN)
            await self._gateway.append(
                connection,
                tenant_id,
                run_stream(run_id),
                EventKind.STEP_RECONCILED,
                actor,
                {"happened": happened, "steps": reconciled, "output": output},
            )
            await self._delivery.enqueue(connection, tenant_id, run_id)
            return await _get(connection, tenant_id, run_id)

    async def mcrc(self, tenant_id: UUID, run_id: UUID) -> Mapping[str, Any]:
        """The run's row in `mcrc_v1_view`."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT * FROM mcrc_v1_view WHERE tenant_id = %s AND run_id = %s", [tenant_id, run_id]
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("run", run_id)
            return row

    async def artifact(self, tenant_id: UUID, artifact_id: UUID) -> ArtifactRow:
        """One artifact's record."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT id, run_id, trace_id, mime_type, size_bytes, backend, storage_uri FROM artifacts "
                "WHERE tenant_id = %s AND id = %s",
                [tenant_id, artifact_id],
            )
            row = await cursor.fetchone()
            if row is None:
                raise NotFound("artifact", artifact_id)
            return ArtifactRow(**row)

    async def unrecorded(self, tenant_id: UUID, artifact_ids: Sequence[UUID]) -> Sequence[UUID]:
        """Those of the ids that no artifact of the tenant has a record under."""
        async with self._gateway.transaction(tenant_id) as connection:
            cursor = await connection.execute(
                "SELECT given.id FROM unnest(%s::uuid[]) AS given (id) "
                "WHERE EXISTS (SELECT FROM tenants WHERE id = %s) AND NOT EXISTS ("
                "SELECT FROM artifacts AS a WHERE a.tenant_id = %s AND a.id = given.id)",
                [list(artifact_ids), tenant_id, tenant_id],
            )
            return [row["id"] for row in await cursor.fetchall()]


async def _run_of_key(connection: Session, new: NewRun) -> UUID | None:
    """The run that the key already stands for.

    Raises:
        IdempotencyConflict: that one was of another request.
    """
    cursor = await connection.execute(
        "SELECT digest, result FROM idempotency_records WHERE tenant_id = %s AND operation = %s AND command_id = %s",
        [new.tenant_id, _CREATE_OPERATION, new.idempotency_key],
    )
    record = await cursor.fetchone()
    if record is None:
        return None
    if record["digest"] != new.request_digest:
        raise IdempotencyConflict(
            f"Idempotency-Key {new.idempotency_key!r} was already used for another request; send a new key"
        )
    return UUID(record["result"]["run_id"])


async def _get(connection: Session, tenant_id: UUID, run_id: UUID, *, lock: bool = False) -> Run:
    cursor = await connection.execute(_GET_LOCKED if lock else _GET, [tenant_id, run_id])
    row = await cursor.fetchone()
    if row is None:
        raise NotFound("run", run_id)
    return run_row(row)


async def _read_ahead(cursor: AsyncServerCursor[Any], size: int) -> AsyncIterator[Sequence[Any]]:
    """All rows of an open cursor in batches; the server is at the next while one is worked on."""
    ahead = asyncio.ensure_future(cursor.fetchmany(size))
    try:
        while rows := await ahead:
            ahead = asyncio.ensure_future(cursor.fetchmany(size))
            await asyncio.sleep(0)  # it is asked for before this goes on
            yield rows
    finally:
        ahead.cancel()
        with suppress(asyncio.CancelledError):
            await ahead
