"""The control plane: decides what agents may do, and keeps the books of what was done."""

from plm_engine_core.control_plane.admission.admit import Admission, Denied, Granted, Pending, Steered
from plm_engine_core.control_plane.admission.grants import Begun, Grant
from plm_engine_core.control_plane.admission.proposal import Principal, Proposal
from plm_engine_core.control_plane.admission.settle import ArtifactRecord, Outcome, Settlement
from plm_engine_core.control_plane.facade import ControlPlane, RunRequest
from plm_engine_core.control_plane.sync import SyncControlPlane

__all__ = [
    "Admission",
    "ArtifactRecord",
    "Begun",
    "ControlPlane",
    "Denied",
    "Grant",
    "Granted",
    "Outcome",
    "Pending",
    "Principal",
    "Proposal",
    "RunRequest",
    "Settlement",
    "Steered",
    "SyncControlPlane",
]
