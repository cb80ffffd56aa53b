"""What is logged can be read: a lost database is one line with its reason, a defect shows where it happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import asyncio
import logging
import uuid
import psycopg, psycopg_pool
from plm_backend.logs import configure_logging
from plm_backend.settings import Settings
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.identity.audit import AuditUnavailable
from procrastinate.exceptions import ConnectorException

def unreachable():
    raise ConnectorException() from psycopg.OperationalError("no route to host")

def unanswered():
    raise StorageUnavailable("the database gave no answer") from TimeoutError()

def unaudited(cause, below=None):
    def fail():
        cause.__cause__ = below
        raise AuditUnavailable("not written", tenant_id=uuid.uuid4()) from cause

    return fail

def fail(error):
    raise error() if callable(error) else error

configure_logging(Settings())
for name, error in {
    "refused": psycopg.OperationalError("connection refused\\n\\tIs the server up?"),
    "ended": psycopg.errors.AdminShutdown("terminating connection"),
    "closed": psycopg.InterfaceError("the connection is closed"),
    "crowded": psycopg_pool.PoolTimeout("none after 3.00 sec"),
    "unreachable": unreachable,
    "unanswered": unanswered,
    "unaudited": unaudited(psycopg.OperationalError("the server is away")),
    "unaudited in time": unaudited(TimeoutError(), asyncio.CancelledError()),
    "audit defect": unaudited(psycopg.errors.UndefinedTable("no such table")),
    "defect": psycopg.errors.UndefinedTable("no such table"),
}.items():
    try:
        fail(error)
    except Exception:
        logging.getLogger("plm_backend").exception(name)
"""


@pytest.fixture(scope="module")
def logged() -> dict[str, dict[str, Any]]:
    """What a process outside development logs of each error."""
    environment = {**os.environ, "ENVIRONMENT": "staging"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    return {line["event"]: line for line in lines}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("refused", "connection refused Is the server up?"),
        ("ended", "terminating connection"),
        ("closed", "the connection is closed"),
        ("crowded", "none after 3.00 sec"),
        ("unreachable", "no route to host"),
        ("unanswered", "the database gave no answer"),
        ("unaudited", "the server is away"),
        ("unaudited in time", "not written"),
    ],
)
def test_a_lost_database_is_one_line_with_its_reason_and_without_a_traceback(
    logged: dict[str, dict[str, Any]], error: str, reason: str
) -> None:
    assert logged[error].keys() == {"event", "level", "logger", "timestamp", "reason"}
    assert logged[error]["reason"] == reason


@pytest.mark.parametrize("error", ["defect", "audit defect"])
def test_a_defect_is_logged_with_where_it_happened(logged: dict[str, dict[str, Any]], error: str) -> None:
    assert "in fail" in logged[error]["exception"]
    assert "no such table" in logged[error]["exception"]
