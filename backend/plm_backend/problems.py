"""Problem details (RFC 9457): every error of the API has one shape, a stable `type` and a frozen `code`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from plm_engine_core.control_plane import errors as engine
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
TOO_LARGE = 413
TYPE_BASE = "urn:plm-platform:problem:"

_TITLES = {
    "validation/schema_invalid": "The request does not have the documented shape",
    "validation/body_too_large": "The request body is too large",
    "validation/run_not_found": "Nothing of that id exists in this tenant",
    "validation/idempotency_conflict": "The Idempotency-Key was used for another request",
    "validation/impossible_transition": "The present state does not allow this",
    "validation/hitl_decision_conflict": "The approval ticket cannot be decided any more",
    "authorization/forbidden": "The caller may not do this",
    "dependency/storage_unavailable": "The database did not answer in time",
    "runtime/error": "Something went wrong on our side",
    "http/error": "The request could not be served",
}
_CONFLICT_CODES = {
    "already_decided": "validation/hitl_decision_conflict",
    "approval_expired": "timeout/hitl_timeout",
    "idempotency_conflict": "validation/idempotency_conflict",
}
_TITLES["timeout/hitl_timeout"] = "The deadline of the approval has passed"


def problem(
    status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any
) -> JSONResponse:
    """One problem document; `code` is the frozen category/name, `type` is a URN made of it."""
    body = {
        "type": TYPE_BASE + code.replace("/", ":"),
        "title": _TITLES.get(code, code),
        "status": status,
        "detail": detail,
        "code": code,
        **{key: value for key, value in members.items() if value not in (None, "", [], (), {})},
    }
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def install(app: FastAPI) -> None:
    """Answer every error of the packages below, and of the framework, as a problem document."""

    @app.exception_handler(engine.InvalidRequest)
    async def invalid(_: Request, error: engine.InvalidRequest) -> JSONResponse:
        return problem(422, "validation/schema_invalid", str(error), field=error.field)

    @app.exception_handler(engine.NotFound)
    async def not_found(_: Request, error: engine.NotFound) -> JSONResponse:
        return problem(404, "validation/run_not_found", str(error))

    @app.exception_handler(engine.Forbidden)
    async def forbidden(_: Request, error: engine.Forbidden) -> JSONResponse:
        return problem(
            403, "authorization/forbidden", str(error), reason=error.reason, missing_scopes=list(error.missing_scopes)
        )

    @app.exception_handler(engine.Conflict)
    async def conflict(_: Request, error: engine.Conflict) -> JSONResponse:
        code = _CONFLICT_CODES.get(error.reason, "validation/impossible_transition")
        return problem(409, code, str(error), reason=error.reason)

    @app.exception_handler(engine.StorageUnavailable)
    async def unavailable(_: Request, error: engine.StorageUnavailable) -> JSONResponse:
        return problem(
            503, "dependency/storage_unavailable", str(error), headers={"Retry-After": "1"}, retry_after_ms=1000
        )

    @app.exception_handler(RequestValidationError)
    async def schema(_: Request, error: RequestValidationError) -> JSONResponse:
        fields = [
            {"field": ".".join(str(part) for part in each["loc"]), "message": each["msg"]} for each in error.errors()
        ]
        first = fields[0] if fields else {"field": "body", "message": "cannot be read"}
        return problem(422, "validation/schema_invalid", f"{first['field']}: {first['message']}", fields=fields)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        code = "validation/body_too_large" if error.status_code == TOO_LARGE else "http/error"
        return problem(error.status_code, code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> JSONResponse:
        logger.error("an unforeseen error reached the API", exc_info=error)
        return problem(500, "runtime/error", "the request failed for a reason of ours; the log has it")
