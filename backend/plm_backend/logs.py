"""Logs: one event a line on standard error; JSON everywhere but in development."""

from __future__ import annotations

import logging
import sys

import psycopg
import structlog
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.identity.audit import AuditUnavailable
from procrastinate.exceptions import ConnectorException

from plm_backend.settings import Settings

_LOST = (ConnectorException, StorageUnavailable, psycopg.InterfaceError, psycopg.OperationalError)


def configure_logging(settings: Settings, *, level: int = logging.INFO) -> None:
    """Send the logs of every package through one formatter."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _lost_database_in_one_line,
        structlog.processors.format_exc_info,
        _without_colours,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if settings.development
        else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("alembic", "procrastinate", "uvicorn.access", "psycopg.pool"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _without_colours(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event.pop("color_message", None)  # uvicorn says everything twice
    return event


def _lost_database_in_one_line(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Where the program stood when the database went away tells nobody anything."""
    match event.get("exc_info"):
        case (_, BaseException() as error, _) if reason := _reason_of_loss(error):
            del event["exc_info"]
            event["reason"] = reason
    return event


def _reason_of_loss(error: BaseException) -> str:
    """The last words of the causes of an error, when one of them is a lost database; else nothing."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    lost = (*_LOST, TimeoutError) if isinstance(error, AuditUnavailable) else _LOST
    if not any(isinstance(each, lost) for each in chain):
        return ""
    return next((words for each in reversed(chain) if (words := " ".join(str(each).split()))), type(error).__name__)
