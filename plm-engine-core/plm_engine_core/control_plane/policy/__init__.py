"""Deciding: pure functions of a proposal, a policy snapshot and gathered facts. No I/O, no clock."""

from plm_engine_core.control_plane.policy.approval import (
    ApprovalDemand,
    ApprovalRule,
    Demand,
    Escalation,
    InputRule,
    StandingApproval,
)
from plm_engine_core.control_plane.policy.decide import decide
from plm_engine_core.control_plane.policy.decision import Decision, Needs, RoutingDecision, StageResult, Verdict
from plm_engine_core.control_plane.policy.facts import Evaluation, Facts, Proposed
from plm_engine_core.control_plane.policy.routing import classify, route
from plm_engine_core.control_plane.policy.rules import Effect, EvaluatorSpec, Rule
from plm_engine_core.control_plane.policy.snapshot import (
    BudgetDefaults,
    PolicySnapshot,
    RateLimit,
    load_policy,
    read_policy,
)

__all__ = [
    "ApprovalDemand",
    "ApprovalRule",
    "BudgetDefaults",
    "Decision",
    "Demand",
    "Effect",
    "Escalation",
    "Evaluation",
    "EvaluatorSpec",
    "Facts",
    "InputRule",
    "Needs",
    "PolicySnapshot",
    "Proposed",
    "RateLimit",
    "RoutingDecision",
    "Rule",
    "StageResult",
    "StandingApproval",
    "Verdict",
    "classify",
    "decide",
    "load_policy",
    "read_policy",
    "route",
]
