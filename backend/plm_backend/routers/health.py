"""Health: for whoever decides whether to restart this process, or to send it requests."""

from __future__ import annotations

import psycopg
from fastapi import APIRouter, Response
from psycopg_pool import PoolTimeout

from plm_backend.dependencies import ThePlatform
from plm_backend.schemas import Health

router = APIRouter(prefix="/v1/health", tags=["health"])


@router.get("/live", operation_id="live", response_model=Health)
async def live() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.get("/ready", operation_id="ready", response_model=Health, responses={503: {"model": Health}})
async def ready(platform: ThePlatform, response: Response) -> Health:
    """The process can serve: its database answers."""
    try:
        async with platform.pool.connection(timeout=2.0) as connection:
            await connection.execute("SELECT 1")
    except (psycopg.Error, PoolTimeout) as error:
        response.status_code = 503
        return Health(status="unavailable", checks={"database": type(error).__name__})
    return Health(status="ready", checks={"database": "ok"})
