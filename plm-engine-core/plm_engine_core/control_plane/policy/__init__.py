"""Deciding: pure functions of a proposal, a policy snapshot and gathered facts. No I/O, no clock."""

from plm_engine_core.control_plane.policy.decide import Decision, Facts, Verdict, decide
from plm_engine_core.control_plane.policy.snapshot import BudgetDefaults, PolicySnapshot, RateLimit, load_policy

__all__ = ["BudgetDefaults", "Decision", "Facts", "PolicySnapshot", "RateLimit", "Verdict", "decide", "load_policy"]
