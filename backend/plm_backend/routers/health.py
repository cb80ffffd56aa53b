"""Health: for whoever decides whether to restart this process, or to send it requests."""

from __future__ import annotations

import psycopg
from fastapi import APIRouter, Response
from plm_engine_core.control_plane.errors import StorageUnavailable
from psycopg_pool import PoolTimeout

from plm_backend.dependencies import ThePlatform
from plm_backend.schemas import Health
from plm_backend.wiring import Platform

router = APIRouter(prefix="/v1/health", tags=["health"])

_OK = "ok"


@router.get("/live", operation_id="live", response_model=Health)
async def live() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.get("/ready", operation_id="ready", response_model=Health, responses={503: {"model": Health}})
async def ready(platform: ThePlatform, response: Response) -> Health:
    """The process can serve: its database answers, and it has a policy to decide by."""
    checks = {"database": await _database(platform), "policy": _policy(platform)}
    if set(checks.values()) == {_OK}:
        return Health(status="ready", checks=checks)
    response.status_code = 503
    return Health(status="unavailable", checks=checks)


async def _database(platform: Platform) -> str:
    try:
        async with platform.pool.connection(timeout=2.0) as connection:
            await connection.execute("SELECT 1")
    except (psycopg.Error, PoolTimeout) as error:
        return type(error).__name__
    return _OK


def _policy(platform: Platform) -> str:
    try:
        _ = platform.control_plane.policy
    except StorageUnavailable:
        return "the active policy cannot be loaded"
    return _OK
