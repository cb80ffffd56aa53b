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
from starlette.routing import Match

from plm_backend.artifacts import ArtifactStoreUnavailable

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
NOT_FOUND, NOT_ALLOWED, CONFLICT, PRECONDITION_FAILED, TOO_LARGE = 404, 405, 409, 412, 413
TYPE_BASE = "urn:plm:problem:"

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_LONGEST_MESSAGE = 400
_MOST_FIELDS = 50

_TITLES = {
    "authorization/forbidden": "The caller may not do this",
    "dependency/policy_missing": "The policy in force cannot be loaded here",
    "dependency/storage_unavailable": "The database did not answer in time",
    "http/error": "The request could not be served",
    "http/method_not_allowed": "Nothing is served this way at this address",
    "http/no_such_address": "There is nothing at this address",
    "runtime/error": "Something went wrong on our side",
    "timeout/hitl_timeout": "The deadline of the approval has passed",
    "validation/body_too_large": "The request body is too large",
    "validation/body_unreadable": "The request body is no readable JSON",
    "validation/hitl_decision_conflict": "The approval ticket cannot be decided any more",
    "validation/idempotency_conflict": "The Idempotency-Key was used for another request",
    "validation/impossible_transition": "The present state does not allow this",
    "validation/media_type_unsupported": "The request body is of a kind this API does not take",
    "validation/precondition_failed": "What was looked at has changed since",
    "validation/run_not_found": "Nothing of that id exists in this tenant",
    "validation/schema_invalid": "The request does not have the documented shape",
}
_CONFLICT_CODES = {
    "already_decided": "validation/hitl_decision_conflict",
    "already_voted": "validation/hitl_decision_conflict",
    "approval_expired": "timeout/hitl_timeout",
    "changed_meanwhile": "validation/precondition_failed",
    "escalated": "validation/hitl_decision_conflict",
    "idempotency_conflict": "validation/idempotency_conflict",
    "ticket_kind": "validation/hitl_decision_conflict",
}
_STATUS_CODES = {
    400: "validation/body_unreadable",
    404: "http/no_such_address",
    405: "http/method_not_allowed",
    413: "validation/body_too_large",
    415: "validation/media_type_unsupported",
}
_REMEDIES = {
    "already_decided": "read the ticket, nothing is left to decide",
    "already_voted": "have somebody else say otherwise",
    "approval_expired": "start a new run to ask again",
    "changed_meanwhile": "read it again, then decide",
    "escalated": "have somebody decide who holds the scope that the ticket now needs",
    "feed_pruned": "ask again with `cursor`",
    "idempotency_conflict": "send the first request again, or choose another key",
    "impossible_transition": "read the run, nothing is left to change",
    "input_not_allowed": "deny the ticket",
    "missing_scopes": "get a token that holds it",
    "not_human": "have a person decide",
    "policy_changed": "GET /v1/policy names the one that has the role",
    "outcome_unknown": "an operator does that with `plm-cli run reconcile`",
    "scope_not_allowed": "approve this call only, or offer less",
    "separation_of_duties": "have somebody else decide",
    "ticket_kind": "its `kind` says which",
}
"""What to do about a reason; the reason itself is the engine's word."""

_MEANINGS = {
    400: "The request cannot be read.",
    401: "No identity: the bearer token is missing, forged, expired or of an unknown tenant.",
    403: "The caller may not do this.",
    404: "Nothing of that id exists in the caller's tenant.",
    409: "The present state does not allow this.",
    412: "What `If-Match` names is not how it is now.",
    413: "The body is larger than this API takes.",
    415: "The body has another media type than JSON, or a content coding.",
    422: "The request does not have the documented shape; `detail` names the field.",
    503: "The database, the audit log or the policy is not to be had now; try again.",
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

BODIES = (400, 413, 415)
"""What an operation with a body may answer besides."""


def install(app: FastAPI) -> None:
    """Answer every error of the packages below, and of the framework, as a problem document."""

    @app.exception_handler(engine.InvalidRequest)
    async def invalid(_: Request, error: engine.InvalidRequest) -> ProblemResponse:
        return problem(422, "validation/schema_invalid", _corrected(str(error)), field=error.field)

    @app.exception_handler(engine.NotFound)
    async def not_found(_: Request, error: engine.NotFound) -> ProblemResponse:
        detail = f"{error} in your tenant; check the id, and whose token you send"
        return problem(404, "validation/run_not_found", detail)

    @app.exception_handler(engine.Forbidden)
    async def forbidden(_: Request, error: engine.Forbidden) -> ProblemResponse:
        refused = error if isinstance(error, engine.InputRefused) else None
        remedy = refused.unblock if refused is not None else _REMEDIES.get(error.reason, "ask somebody who may")
        return problem(
            403,
            "authorization/forbidden",
            f"{error}; {remedy}",
            reason=error.reason,
            missing_scopes=list(error.missing_scopes),
            evaluator=refused and refused.evaluator,
            rule=refused and refused.rule,
        )

    @app.exception_handler(engine.Conflict)
    async def conflict(_: Request, error: engine.Conflict) -> ProblemResponse:
        code = _CONFLICT_CODES.get(error.reason, "validation/impossible_transition")
        detail = f"{error}; {_REMEDIES.get(error.reason, 'read the present state and decide anew')}"
        cursor = error.cursor if isinstance(error, engine.FeedPruned) else None
        status = PRECONDITION_FAILED if code == "validation/precondition_failed" else CONFLICT
        return problem(status, code, detail, reason=error.reason, cursor=cursor)

    @app.exception_handler(engine.PolicyMissing)
    async def undecided(_: Request, error: engine.PolicyMissing) -> ProblemResponse:
        logger.warning("a request was refused: %s", error)
        return problem(
            503,
            "dependency/policy_missing",
            f"{error}; send the same request again, or have a policy activated that this release can load",
            headers={"Retry-After": "5"},
            retry_after_ms=5000,
        )

    @app.exception_handler(engine.StorageUnavailable)
    async def unavailable(_: Request, error: engine.StorageUnavailable) -> ProblemResponse:
        logger.warning("a request was refused: %s", error)
        return problem(
            503,
            "dependency/storage_unavailable",
            "the database did not answer in time; send the same request again in a moment, with its Idempotency-Key",
            headers={"Retry-After": "1"},
            retry_after_ms=1000,
        )

    @app.exception_handler(ArtifactStoreUnavailable)
    async def unstored(_: Request, error: ArtifactStoreUnavailable) -> ProblemResponse:
        logger.warning("a request was refused: %s", error)
        return problem(
            503,
            "dependency/storage_unavailable",
            "the artifact store did not take or hand out a file; send the same request again in a moment, with its "
            "Idempotency-Key",
            headers={"Retry-After": "1"},
            retry_after_ms=1000,
        )

    @app.exception_handler(RequestValidationError)
    async def schema(_: Request, error: RequestValidationError) -> ProblemResponse:
        fields = [_field(each) for each in error.errors()[:_MOST_FIELDS]]
        detail = _corrected(f"{fields[0]['field']}: {fields[0]['message']}") if fields else "send what is documented"
        return problem(422, "validation/schema_invalid", detail, fields=fields)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> ProblemResponse:
        code = _STATUS_CODES.get(error.status_code, "http/error")
        detail, headers = str(error.detail), dict(error.headers or {})
        if error.status_code == NOT_FOUND:
            detail = f"{request.url.path!r:.200} is no address of this API; /openapi.json lists them"
        elif error.status_code == NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods(app, request))
            detail = f"{request.method} is not served at {request.url.path!r:.200}; use {headers['Allow']}"
        return problem(error.status_code, code, detail, headers=headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> ProblemResponse:
        logger.error("an unforeseen error reached the API", exc_info=error)
        return problem(500, "runtime/error", "the request failed for a reason of ours; the log has it")


def _corrected(text: str) -> str:
    """What is wrong, with what to do about it where the text does not say that itself."""
    return text if "; " in text else f"{text}; correct it and send the request again"


def _field(error: Mapping[str, Any]) -> dict[str, str]:
    """One finding of pydantic's: which field, what is wrong, and the value where it is a short one."""
    message = str(error["msg"]).removeprefix("Value error, ")
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} … {message[-_LONGEST_MESSAGE // 2 :]}"
    given = error.get("input")
    shown = f", not {given!r:.80}" if isinstance(given, str | int | float) and "; " not in message else ""
    return {"field": ".".join(str(part) for part in error["loc"]), "message": message + shown}


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Every method that is served at the request's address (RFC 9110, section 10.2.1)."""

    def served(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in app.routes)

    return [method for method in _METHODS if served(method)]
