"""Problem details (RFC 9457): every error of the API has one shape, a stable `type` and a frozen `code`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from plm_engine_core.control_plane import errors as engine
from pydantic import BaseModel
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
TOO_LARGE = 413
TYPE_BASE = "urn:plm:problem:"

_TITLES = {
    "authorization/forbidden": "The caller may not do this",
    "dependency/storage_unavailable": "The database did not answer in time",
    "http/error": "The request could not be served",
    "runtime/error": "Something went wrong on our side",
    "timeout/hitl_timeout": "The deadline of the approval has passed",
    "validation/body_too_large": "The request body is too large",
    "validation/hitl_decision_conflict": "The approval ticket cannot be decided any more",
    "validation/idempotency_conflict": "The Idempotency-Key was used for another request",
    "validation/impossible_transition": "The present state does not allow this",
    "validation/run_not_found": "Nothing of that id exists in this tenant",
    "validation/schema_invalid": "The request does not have the documented shape",
}
_CONFLICT_CODES = {
    "already_decided": "validation/hitl_decision_conflict",
    "approval_expired": "timeout/hitl_timeout",
    "idempotency_conflict": "validation/idempotency_conflict",
}
_MEANINGS = {
    400: "The request cannot be read.",
    401: "No identity: the bearer token is missing, forged, expired or of an unknown tenant.",
    403: "The caller may not do this.",
    404: "Nothing of that id exists in the caller's tenant.",
    409: "The present state does not allow this.",
    413: "The body is larger than this API takes.",
    422: "The request does not have the documented shape; `detail` names the field.",
    503: "The database or the audit log did not answer in time; try again.",
}


class Problem(BaseModel):
    """Problem details (RFC 9457). `type` and `code` are stable; further members depend on the code."""

    type: str
    title: str
    status: int
    detail: str
    code: str


class ProblemResponse(JSONResponse):
    """A problem document, in ASCII: whatever odd text of a request it repeats can be sent."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        """The bytes of the document."""
        return json.dumps(content).encode()


def problem(
    status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any
) -> ProblemResponse:
    """One problem document; `code` is the frozen category/name, `type` is a URN made of it."""
    document = Problem(
        type=TYPE_BASE + code.replace("/", ":"),
        title=_TITLES[code],
        status=status,
        detail=detail,
        code=code,
    )
    extra = {key: value for key, value in members.items() if value not in (None, "", [], (), {})}
    return ProblemResponse({**document.model_dump(), **extra}, status_code=status, headers=dict(headers or {}))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of an operation, for OpenAPI; every operation of a tenant has those of its doors."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in sorted(statuses)}


DOORS = (400, 401, 403, 422, 503)
"""What any authenticated operation may answer: its tenant, identity, scopes, parameters and database."""


def install(app: FastAPI) -> None:
    """Answer every error of the packages below, and of the framework, as a problem document."""

    @app.exception_handler(engine.InvalidRequest)
    async def invalid(_: Request, error: engine.InvalidRequest) -> ProblemResponse:
        return problem(422, "validation/schema_invalid", str(error), field=error.field)

    @app.exception_handler(engine.NotFound)
    async def not_found(_: Request, error: engine.NotFound) -> ProblemResponse:
        return problem(404, "validation/run_not_found", str(error))

    @app.exception_handler(engine.Forbidden)
    async def forbidden(_: Request, error: engine.Forbidden) -> ProblemResponse:
        return problem(
            403, "authorization/forbidden", str(error), reason=error.reason, missing_scopes=list(error.missing_scopes)
        )

    @app.exception_handler(engine.Conflict)
    async def conflict(_: Request, error: engine.Conflict) -> ProblemResponse:
        code = _CONFLICT_CODES.get(error.reason, "validation/impossible_transition")
        return problem(409, code, str(error), reason=error.reason)

    @app.exception_handler(engine.StorageUnavailable)
    async def unavailable(_: Request, error: engine.StorageUnavailable) -> ProblemResponse:
        logger.warning("a request was refused because the database did not answer", exc_info=error)
        return problem(
            503,
            "dependency/storage_unavailable",
            "the database did not answer in time; nothing was changed, try again",
            headers={"Retry-After": "1"},
            retry_after_ms=1000,
        )

    @app.exception_handler(RequestValidationError)
    async def schema(_: Request, error: RequestValidationError) -> ProblemResponse:
        fields = [
            {"field": ".".join(str(part) for part in each["loc"]), "message": each["msg"]} for each in error.errors()
        ]
        first = fields[0] if fields else {"field": "body", "message": "cannot be read"}
        return problem(422, "validation/schema_invalid", f"{first['field']}: {first['message']}", fields=fields[:50])

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> ProblemResponse:
        code = "validation/body_too_large" if error.status_code == TOO_LARGE else "http/error"
        return problem(error.status_code, code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> ProblemResponse:
        logger.error("an unforeseen error reached the API", exc_info=error)
        return problem(500, "runtime/error", "the request failed for a reason of ours; the log has it")
