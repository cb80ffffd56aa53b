"""Markers: named places that people and hosts put into the stream of a run, to find them again.

A marker changes nothing and restores nothing. It is one event, and `ControlPlane.as_of` tells how the run stood there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from plm_shared.canonical_json import JsonRefused, storable_json

from plm_engine_core.control_plane.admission.proposal import Principal, check_principal, content_hash
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest
from plm_engine_core.control_plane.storage.ports import MarkCommand, RunStore
from plm_engine_core.control_plane.texts import LONGEST_KEY, LONGEST_NAME, check_text

MARK_SCOPE: Final = "plm.runs.create"
LARGEST_DETAILS: Final = 4_000
"""How many bytes the JSON text of a marker's details may have."""


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A named place of a run: its stream up to the event `seq`, which is the marker itself."""

    run_id: UUID
    name: str
    seq: int


async def mark(
    store: RunStore,
    tenant_id: UUID,
    run_id: UUID,
    name: str,
    *,
    command_id: str,
    by: Principal,
    details: Mapping[str, Any] | None = None,
) -> Marker:
    """Put a marker into the stream of a run that has not ended, as one event of the kind `marker`.

    The state, the tickets and the budgets of the run stay as they are. The same command again puts no other one, and
    answers the place of the first, also after the run has ended. Names may be used again.

    Raises:
        Forbidden: the caller lacks `plm.runs.create`, or acts by a delegation that has ended.
        InvalidRequest: no name, no command id, or details that are no small JSON object; names the field.
        NotFound: no such run in this tenant.
        Conflict: the run has ended.
        IdempotencyConflict: the command id was used for another marker.
    """
    check_principal(by, field="by")
    if MARK_SCOPE not in by.scopes:
        raise Forbidden(
            f"marking a run needs the OAuth scope {MARK_SCOPE}", reason="missing_scopes", missing_scopes=(MARK_SCOPE,)
        )
    check_text(name, field="name", longest=LONGEST_NAME)
    check_text(command_id, field="command_id", longest=LONGEST_KEY)
    told = _checked(details)
    if by.expires_at is not None and by.expires_at.utcoffset() is None:
        raise InvalidRequest("the end of a delegation needs a time zone", field="by.expires_at")
    if by.expires_at is not None and by.expires_at <= await store.now():
        raise Forbidden(f"the delegation ended at {by.expires_at.isoformat()}", reason="delegation_expired")
    command = MarkCommand(
        tenant_id=tenant_id,
        run_id=run_id,
        name=name,
        details=told,
        command_id=command_id,
        digest=content_hash([str(run_id), name, told]),
        actor=by.actor,
    )
    return Marker(run_id=run_id, name=name, seq=await store.mark(command))


def _checked(details: object) -> dict[str, Any]:
    if details is None:
        return {}
    if not isinstance(details, Mapping):
        raise InvalidRequest(f"'details' must be a mapping, not {details!r:.80}", field="details")
    told = dict(details)
    try:
        size = len(storable_json(told, root="details").encode())
    except JsonRefused as error:
        raise InvalidRequest(str(error), field=error.path) from error
    if size > LARGEST_DETAILS:
        raise InvalidRequest(
            f"'details' are {size} bytes of JSON and may be {LARGEST_DETAILS}; store more as an artifact and name it",
            field="details",
        )
    return told
