"""The control plane that decides what agents may do, and the runtime that runs them.

The names here are the way in; they are loaded when they are first used, so that importing a part stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plm_engine_core.agent_runtime.current_call import CallStopped, CurrentCall, current_call
    from plm_engine_core.agent_runtime.governed import OutcomeUnknown, governed
    from plm_engine_core.agent_runtime.governor import Governor
    from plm_engine_core.agent_runtime.refusals import CallDenied, CallPending, CallRefused, CallSteered, OutputWithheld
    from plm_engine_core.control_plane.facade import ControlPlane
    from plm_engine_core.control_plane.sync import SyncControlPlane

__all__ = [
    "CallDenied",
    "CallPending",
    "CallRefused",
    "CallSteered",
    "CallStopped",
    "ControlPlane",
    "CurrentCall",
    "Governor",
    "OutcomeUnknown",
    "OutputWithheld",
    "SyncControlPlane",
    "current_call",
    "governed",
]

_HOMES = {
    "CallDenied": "agent_runtime.refusals",
    "CallPending": "agent_runtime.refusals",
    "CallRefused": "agent_runtime.refusals",
    "CallSteered": "agent_runtime.refusals",
    "CallStopped": "agent_runtime.current_call",
    "ControlPlane": "control_plane.facade",
    "CurrentCall": "agent_runtime.current_call",
    "Governor": "agent_runtime.governor",
    "OutcomeUnknown": "agent_runtime.governed",
    "OutputWithheld": "agent_runtime.refusals",
    "SyncControlPlane": "control_plane.sync",
    "current_call": "agent_runtime.current_call",
    "governed": "agent_runtime.governed",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
