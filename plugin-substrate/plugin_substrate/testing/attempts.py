"""Asks a loaded `ConfinementProbe` to try something and tells how it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plugin_substrate.errors import WorkerDiedError
from plugin_substrate.testing.workers import PluginWorker


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How one attempt went: ``error`` is an errno's name, Python's own error, or the signal that ended the worker."""

    done: bool
    error: str = ""
    detail: str = ""


def attempt(probe: PluginWorker, action: str, **arguments: Any) -> Attempt:
    """Have a loaded `ConfinementProbe` try ``action``, outside an event loop.

    Actions: ``read``, ``list``, ``write`` (each with ``path``), ``connect`` (``host``, ``port``), ``socket``
    (``family``), ``fork``, ``spawn`` (``command``), ``signal`` (``pid``), ``threads`` (``count``), ``memory``
    (``size``, ``shared``), ``file_size`` (``size``), ``open_files`` (``count``), ``raise_limit`` (``name``).
    """
    return probe.run(lambda: attempt_async(probe, action, **arguments))


async def attempt_async(probe: PluginWorker, action: str, **arguments: Any) -> Attempt:
    """Like `attempt`, inside an event loop."""
    try:
        result = await probe.call_async(action=f"probe.{action}", **arguments)
    except WorkerDiedError as death:
        return Attempt(done=False, error=death.signal_name or f"status {death.returncode}", detail=str(death))
    return Attempt(**result.value)
