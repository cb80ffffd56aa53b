"""The control plane: decides what agents may do, and keeps the books of what was done.

The names here are loaded when they are first used, so that a part of it, its errors or its identities, loads without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plm_engine_core.control_plane.admission.admit import Admission, Denied, Granted, Pending, Steered
    from plm_engine_core.control_plane.admission.grants import Begun, Grant
    from plm_engine_core.control_plane.admission.proposal import Principal, Proposal
    from plm_engine_core.control_plane.admission.settle import ArtifactRecord, Outcome, Settlement
    from plm_engine_core.control_plane.facade import ControlPlane
    from plm_engine_core.control_plane.runs.request import RunRequest
    from plm_engine_core.control_plane.sync import SyncControlPlane

__all__ = [
    "Admission",
    "ArtifactRecord",
    "Begun",
    "ControlPlane",
    "Denied",
    "Grant",
    "Granted",
    "InputRequest",
    "Outcome",
    "Pending",
    "Principal",
    "Proposal",
    "RunRequest",
    "Settlement",
    "Steered",
    "SyncControlPlane",
]

_HOMES = {
    "Admission": "admission.admit",
    "ArtifactRecord": "admission.settle",
    "Begun": "admission.grants",
    "ControlPlane": "facade",
    "Denied": "admission.admit",
    "Grant": "admission.grants",
    "Granted": "admission.admit",
    "InputRequest": "admission.ask",
    "Outcome": "admission.settle",
    "Pending": "admission.admit",
    "Principal": "admission.proposal",
    "Proposal": "admission.proposal",
    "RunRequest": "runs.request",
    "Settlement": "admission.settle",
    "Steered": "admission.admit",
    "SyncControlPlane": "sync",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
