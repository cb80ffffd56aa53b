"""Runs: units of governed work, made of recorded steps."""

from plm_engine_core.control_plane.runs.run import ArtifactRow, Heartbeat, Lease, NewRun, Run, Step
from plm_engine_core.control_plane.runs.states import TRANSITIONS, sources_of

__all__ = ["TRANSITIONS", "ArtifactRow", "Heartbeat", "Lease", "NewRun", "Run", "Step", "sources_of"]
