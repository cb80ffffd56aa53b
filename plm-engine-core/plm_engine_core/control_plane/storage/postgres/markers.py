"""Markers in the streams of runs."""

from __future__ import annotations

from plm_engine_core.control_plane.errors import IdempotencyConflict
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.storage.ports import MarkCommand
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Session, jsonb
from plm_engine_core.control_plane.vocabulary import EventKind

_OPERATION = "runs.mark"
_NAMED = "tenant_id = %(tenant)s AND operation = %(operation)s AND command_id = %(command)s"


def _names(command: MarkCommand) -> dict[str, object]:
    return {"tenant": command.tenant_id, "operation": _OPERATION, "command": command.command_id}


async def earlier_marker(connection: Session, command: MarkCommand) -> int | None:
    """Take the command id for this marker; when the same one took it before, where that stands."""
    claimed = await connection.execute(
        "INSERT INTO idempotency_records (tenant_id, operation, command_id, digest) "
        "VALUES (%(tenant)s, %(operation)s, %(command)s, %(digest)s) ON CONFLICT DO NOTHING",
        {**_names(command), "digest": command.digest},
    )
    if claimed.rowcount:
        return None
    cursor = await connection.execute(
        f"SELECT digest, result FROM idempotency_records WHERE {_NAMED}".encode(),  # noqa: S608  # a literal
        _names(command),
    )
    record = await cursor.fetchone()
    if record is None or record["digest"] != command.digest:
        raise IdempotencyConflict(f"command {command.command_id} was already used for another marker")
    return int(record["result"]["seq"])


async def put_marker(connection: Session, gateway: Gateway, command: MarkCommand) -> int:
    """Append the marker under the command id that was taken, and answer where it stands."""
    seq = await gateway.append(
        connection,
        command.tenant_id,
        run_stream(command.run_id),
        EventKind.MARKER,
        command.actor,
        {"name": command.name, "details": dict(command.details)},
    )
    await connection.execute(
        f"UPDATE idempotency_records SET result = %(result)s WHERE {_NAMED}".encode(),  # noqa: S608  # a literal
        {**_names(command), "result": jsonb({"seq": seq}, root="result")},
    )
    return seq
