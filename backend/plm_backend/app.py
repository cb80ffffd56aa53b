"""The HTTP application: middleware in its order, routers, problem documents."""

from __future__ import annotations

from functools import partial
from uuid import UUID

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from plm_engine_core.control_plane.identity import IdentityMiddleware, get_current_identity
from plm_shared.middleware import PlmTenantMiddleware, cors_allowed_headers

from plm_backend import problems
from plm_backend.body_limit import BodyLimitMiddleware
from plm_backend.dependencies import each_once
from plm_backend.openapi import describe
from plm_backend.routers import approvals, artifacts, budgets, events, halts, health, policy, registers, runs, why
from plm_backend.wiring import Platform


def create_app(platform: Platform) -> FastAPI:
    """The API over an open platform. Outermost first: CORS, identity, tenant and trace, body limit, router."""
    app = FastAPI(
        title="PLM platform",
        version="1.0.0",
        description="Runs of agents under control: start, follow, approve, halt.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would carry the request's token along
    )
    app.openapi = partial(describe, app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    app.state.platform = platform
    routers = (
        runs.router,
        approvals.router,
        approvals.scopes_router,
        halts.router,
        events.router,
        artifacts.router,
        policy.router,
        budgets.router,
        why.router,
        registers.router,
    )
    for router in routers:
        app.include_router(router, dependencies=[Depends(each_once)])
    app.include_router(health.router)
    problems.install(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=platform.settings.max_body_bytes)
    app.add_middleware(PlmTenantMiddleware, identity_tenant=_identity_tenant)
    app.add_middleware(
        IdentityMiddleware,
        provider=platform.identity,
        audit=platform.audit,
        audit_required=platform.settings.audit_required,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(platform.settings.cors_allowed_origins),
        allow_credentials=True,
        allow_methods=["GET", "POST", "PUT", "DELETE"],
        allow_headers=cors_allowed_headers(["Idempotency-Key", "Last-Event-ID", "traceparent"]),
        expose_headers=["Location", "Idempotency-Key", "Idempotent-Replayed"],
    )
    return app


def _identity_tenant() -> UUID | None:
    identity = get_current_identity()
    return identity.tenant_id if identity is not None else None
