"""How a worker ended, as the errors of those who waited for it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from plugin_substrate.errors import (
    PluginCancelledError,
    PluginError,
    PluginResourceError,
    ProtocolError,
    ResourceShortfall,
    WorkerDiedError,
    WorkerOOMError,
)
from plugin_substrate.worker.text import clean_line

_SHOWN_LINES = 20
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class WorkerExit:
    """How a worker ended: ``returncode`` is None if nobody knows, ``shortfall`` what its supervisor killed it for.

    ``by_kernel`` tells that nobody here killed it, and that the kernel killed something for want of memory in its time.
    """

    returncode: int | None
    shortfall: ResourceShortfall | None = None
    by_kernel: bool = False


def death_of(ended: WorkerExit, broken: ProtocolError | None, lines: Sequence[str]) -> PluginError:
    """Return the error that tells of a death; ``broken`` is what the host killed it for, if it did.

    A `WorkerDiedError`; a `WorkerOOMError` or another `PluginResourceError` when it was killed for what it took, with
    the numbers if its supervisor did it: the kernel tells none.
    """
    if ended.shortfall is not None and broken is None:
        return _excess(ended, ended.shortfall, lines)
    returncode = ended.returncode
    if ended.by_kernel and broken is None and returncode == -signal.SIGKILL:
        return WorkerOOMError(
            "the worker was ended by SIGKILL, and the kernel was killing processes for want of memory",
            process_returncode=returncode,
            log_tail=tuple(lines)[-_SHOWN_LINES:],
        )
    name = _signal_name(returncode)
    how = "ended" if returncode is None else f"ended with status {returncode}"
    if name:
        how = f"was ended by {name}"
    if broken is not None:
        how = f"broke the protocol ({clean_line(str(broken), _SHOWN_CHARACTERS)}) and {how}"
    error = WorkerDiedError(
        f"the worker {how}", returncode=returncode, signal_name=name, log_tail=tuple(lines)[-_SHOWN_LINES:]
    )
    error.__cause__ = broken
    return error


def _excess(ended: WorkerExit, shortfall: ResourceShortfall, lines: Sequence[str]) -> PluginError:
    message = (
        f"the worker was killed: it and its processes took {shortfall.needed} of {shortfall.available} granted "
        f"({shortfall.resource})"
    )
    if shortfall.resource != "memory":
        return PluginResourceError(message, resource_shortfall=shortfall, outcome_known=False)
    tail = tuple(lines)[-_SHOWN_LINES:]
    return WorkerOOMError(
        message, process_returncode=ended.returncode, log_tail=tail, resource_shortfall=shortfall, outcome_known=False
    )


def forced_end_of(call_id: str, death: PluginError) -> PluginCancelledError:
    """Return the error of the call for whose sake its worker was killed."""
    error = PluginCancelledError(
        f"call {call_id} did not end in time, so its worker was killed", forced=True, outcome_known=False
    )
    error.__cause__ = death
    return error


def _signal_name(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return ""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"
