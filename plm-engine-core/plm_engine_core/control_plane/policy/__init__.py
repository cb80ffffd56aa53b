"""Deciding: pure functions of a proposal, a policy snapshot and gathered facts. No I/O, no clock."""

from plm_engine_core.control_plane.policy.decide import decide
from plm_engine_core.control_plane.policy.decision import Decision, Needs, RoutingDecision, StageResult, Verdict
from plm_engine_core.control_plane.policy.facts import Evaluation, Facts, Proposed
from plm_engine_core.control_plane.policy.routing import classify, route
from plm_engine_core.control_plane.policy.rules import Effect, EvaluatorSpec, Rule
from plm_engine_core.control_plane.policy.snapshot import BudgetDefaults, PolicySnapshot, RateLimit, load_policy

__all__ = [
    "BudgetDefaults",
    "Decision",
    "Effect",
    "Evaluation",
    "EvaluatorSpec",
    "Facts",
    "Needs",
    "PolicySnapshot",
    "Proposed",
    "RateLimit",
    "RoutingDecision",
    "Rule",
    "StageResult",
    "Verdict",
    "classify",
    "decide",
    "load_policy",
    "route",
]
