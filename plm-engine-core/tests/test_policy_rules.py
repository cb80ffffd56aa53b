"""Rules, risk, conditions and evaluators in a decision: the strictest wins, and no claim makes it milder."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.policy import (
    Evaluation,
    Facts,
    Needs,
    PolicySnapshot,
    Verdict,
    classify,
    decide,
    route,
)
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    AutonomyLevel,
    CapabilityMode,
    EvaluationStatus,
    Reason,
    RiskLevel,
    RoutingResolutionStep,
)
from pydantic import ValidationError

READ = CapabilityDescriptor(id="mail.read", description="x", mode=CapabilityMode.READ, plugin="mail")
SEND = CapabilityDescriptor(
    id="mail.send", description="x", mode=CapabilityMode.EXECUTE_WRITE, plugin="mail", certified=True
)


@dataclass(frozen=True)
class Proposed:
    """One proposal."""

    capability: str = "mail.read"
    resource: str = "box/1"
    arguments: Mapping[str, Any] = field(default_factory=dict)


def facts(**changes) -> Facts:
    values = {
        "capability": READ,
        "principal_scopes": frozenset(),
        "requester": uuid.UUID(int=1),
        "autonomy": AutonomyLevel.L3,
        "rate_allowed": True,
        "at": datetime(2024, 1, 1, 12, tzinfo=UTC),
    }
    return Facts(**{**values, **changes})


BIG = {"type": "field", "path": "arguments.amount", "operator": "gt", "value": 100}
ALWAYS = {"type": "action", "actions": ["*"]}
CLEAN = {"type": "evaluator", "evaluator_name": "clean"}


def rule(then, when=ALWAYS, **more):
    extra = {"steer": {"guidance": "do less"}, "raise_risk": {"risk": "high"}}.get(then, {})
    return {"id": f"r-{then}", "then": then, **({"when": when} if when else {}), **extra, **more}


def answer(policy, known=None, **arguments):
    return decide(Proposed(arguments=arguments), policy, known or facts())


@pytest.mark.parametrize(
    ("effects", "outcome", "at"),
    [
        (["ask"], Verdict.ASK, "rules.r-ask"),
        (["ask", "steer"], Verdict.STEER, "rules.r-steer"),
        (["ask", "steer", "deny"], Verdict.DENY, "rules.r-deny"),
        (["raise_risk"], Verdict.ASK, "auto_approve_max_risk"),
        ([], Verdict.ALLOW, "tier_by_mode.read"),
    ],
)
def test_the_strictest_rule_wins_and_is_named(make_policy, effects, outcome, at):
    decision = answer(make_policy(rules=[rule(effect) for effect in effects]))
    assert (decision.outcome, decision.rule) == (outcome, at)


def test_a_denial_names_rule_leaves_and_what_would_unblock_it(make_policy):
    policy = make_policy(rules=[rule("deny", BIG, reason="too much at once")])
    decision = answer(policy, amount=101)
    assert decision.reason is Reason.RULE_DENIED
    assert decision.message == "the rule r-deny denies mail.read: too much at once"
    assert decision.unblock == "a proposal to which rules.r-deny does not apply"
    assert [leaf.to_json() for leaf in decision.leaves] == [
        {"at": "rules.r-deny.when", "says": "arguments.amount gt 100", "holds": True}
    ]
    assert not decision.stages[-1].passed
    assert answer(policy, amount=100).outcome is Verdict.ALLOW


@pytest.mark.parametrize("amount", ["much", None, True, [101], {}, ...])
@pytest.mark.parametrize(("then", "outcome"), [("deny", Verdict.DENY), ("ask", Verdict.ASK), ("steer", Verdict.STEER)])
def test_what_cannot_be_decided_counts_against_the_agent(make_policy, amount, then, outcome):
    arguments = {} if amount is ... else {"amount": amount}
    for when in (BIG, {"type": "not", "condition": {**BIG, "operator": "le"}}):
        assert answer(make_policy(rules=[rule(then, when)]), **arguments).outcome is outcome
    for when in (BIG, {"type": "not", "condition": BIG}):
        assert answer(make_policy(auto_approve_when=when), **arguments).outcome is Verdict.ASK


def test_a_rule_is_for_the_capabilities_it_names(make_policy):
    policy = make_policy(rules=[rule("deny", None, capabilities=["mail.s*", "file.*"])], autonomy_ceiling="L3")
    assert answer(policy).outcome is Verdict.ALLOW
    assert answer(policy, facts(capability=SEND)).reason is Reason.RULE_DENIED


def test_conditions_only_narrow_auto_approval(make_policy):
    policy = make_policy(auto_approve_when=ALWAYS, risk_by_capability={"mail.read": "medium"})
    decision = answer(policy)
    assert (decision.outcome, decision.rule) == (Verdict.ASK, "auto_approve_max_risk")
    narrowed = answer(make_policy(auto_approve_when={"type": "not", "condition": ALWAYS}))
    assert (narrowed.outcome, narrowed.rule) == (Verdict.ASK, "auto_approve_when")
    assert [leaf.at for leaf in narrowed.leaves] == ["auto_approve_when.condition"]


def test_unrestricted_skips_approval_and_evaluators_and_no_rule(make_policy):
    evaluators = [{"name": "clean", "kind": "list"}]
    policy = make_policy(tiers={"unrestricted": ["mail.read"]}, evaluators=evaluators, auto_approve_when=CLEAN)
    assert answer(policy).outcome is Verdict.ALLOW
    assert answer(make_policy(tiers={"mail.read": "unrestricted"}, rules=[rule("deny")])).outcome is Verdict.DENY


# --- risk ------------------------------------------------------------------------------------------------------------


def rated(policy, **changes):
    known = facts(**changes)
    assert route(Proposed(), policy, known).risk_level is classify(Proposed(), policy, known)
    return classify(Proposed(), policy, known)


def test_a_capability_has_its_own_risk_but_not_under_its_modes_floor(make_policy):
    assert rated(make_policy(), capability=SEND) is RiskLevel.HIGH
    own = make_policy(risk_by_capability={"mail.send": "low"})
    assert rated(own, capability=SEND) is RiskLevel.LOW
    floored = make_policy(risk_by_capability={"mail.send": "low"}, risk_floor={"execute-write": "medium"})
    assert rated(floored, capability=SEND) is RiskLevel.MEDIUM
    assert rated(floored) is RiskLevel.LOW


@given(
    st.sampled_from(RiskLevel),
    st.dictionaries(
        st.sampled_from(["risk", "weight", "score"]),
        st.sampled_from(["low", "medium", "high", "none", 0, -1, 1.0, None, [], {}, True]),
    ),
)
def test_whatever_the_agent_claims_its_risk_is_never_lower(make_policy, base, claims):
    policy = make_policy(
        risk_by_mode=dict.fromkeys(CapabilityMode, base),
        rules=[rule("raise_risk", {"type": "weight", "max_weight": 1}, risk="medium")],
    )
    assert rated(policy, claims=claims).rank >= base.rank
    if claims.get("risk") == "high":
        assert rated(policy, claims=claims) is RiskLevel.HIGH


# --- evaluators ------------------------------------------------------------------------------------------------------

GATE = {"name": "gate", "kind": "list"}
LEAF = {"name": "clean", "kind": "regex", "gate": False}


def told(**answers):
    return facts(
        evaluations=tuple(
            Evaluation(name=name, status=EvaluationStatus(status), reason=f"{name} says so")
            for name, status in answers.items()
        )
    )


def test_evaluators_are_asked_once_in_declared_order_and_only_when_they_can_matter(make_policy):
    policy = make_policy(evaluators=[GATE, LEAF], auto_approve_when=CLEAN)
    assert answer(policy) == Needs(evaluators=("gate", "clean"))
    assert answer(make_policy(evaluators=[GATE, LEAF])) == Needs(evaluators=("gate",))
    blocked = make_policy(evaluators=[GATE], tiers={"mail.read": "blocked"})
    assert answer(blocked).reason is Reason.CAPABILITY_BLOCKED
    denied = make_policy(evaluators=[GATE], rules=[rule("deny")])
    assert answer(denied).reason is Reason.RULE_DENIED
    elsewhere = make_policy(evaluators=[{**GATE, "capabilities": ["file.*"]}])
    assert answer(elsewhere).outcome is Verdict.ALLOW
    settled = {"type": "and", "conditions": [{"type": "not", "condition": ALWAYS}, CLEAN]}
    assert answer(make_policy(evaluators=[LEAF], auto_approve_when=settled)).outcome is Verdict.ASK


@pytest.mark.parametrize("status", [each for each in EvaluationStatus if each is not EvaluationStatus.ALLOWED])
def test_a_gate_that_does_not_allow_denies(make_policy, status):
    decision = answer(make_policy(evaluators=[GATE]), told(gate=status))
    assert decision.outcome is Verdict.DENY
    denied = status is EvaluationStatus.DENIED
    assert decision.reason is (Reason.EVALUATOR_DENIED if denied else Reason.EVALUATOR_FAILED)
    assert decision.rule == "evaluators.gate"
    assert decision.message.endswith(": gate says so")


def test_a_gate_that_was_not_asked_denies(make_policy):
    assert answer(make_policy(evaluators=[GATE]), told()).reason is Reason.EVALUATOR_FAILED


def test_the_gate_that_denied_is_named_and_not_the_one_that_was_cancelled_for_it(make_policy):
    policy = make_policy(evaluators=[GATE, {**GATE, "name": "second"}])
    assert answer(policy, told(gate="cancelled", second="denied")).rule == "evaluators.second"


@pytest.mark.parametrize("status", list(EvaluationStatus))
def test_a_condition_on_an_evaluator_holds_only_when_it_answered(make_policy, status):
    known = told(clean=status)
    decision = answer(make_policy(evaluators=[LEAF], auto_approve_when=CLEAN), known)
    assert decision.outcome is (Verdict.ALLOW if status is EvaluationStatus.ALLOWED else Verdict.ASK)
    inverted = make_policy(evaluators=[LEAF], auto_approve_when={"type": "not", "condition": CLEAN})
    assert answer(inverted, known).outcome is (Verdict.ALLOW if status is EvaluationStatus.DENIED else Verdict.ASK)


def test_the_verdict_does_not_wait_for_evaluators_that_a_steer_makes_idle(make_policy):
    steered = make_policy(evaluators=[GATE], rules=[rule("steer")])
    assert answer(steered).outcome is Verdict.STEER
    open_denial = make_policy(
        evaluators=[LEAF], rules=[rule("steer"), rule("deny", {"type": "not", "condition": CLEAN})]
    )
    assert answer(open_denial) == Needs(evaluators=("clean",))
    assert answer(open_denial, told(clean="allowed")).outcome is Verdict.STEER
    assert answer(open_denial, told(clean="denied")).reason is Reason.RULE_DENIED


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_route_says_what_settled_it(make_policy):
    steps = {
        "mail.read: unrestricted": (make_policy(tiers={"mail.read": "unrestricted"}), "policy_list_match"),
        "by mode": (make_policy(), "risk_tier_match"),
        "blocked": (make_policy(tiers={"blocked": ["mail.read"]}), "explicit_assignment"),
        "rule": (make_policy(rules=[rule("ask")]), "explicit_assignment"),
    }
    for policy, step in steps.values():
        assert route(Proposed(), policy, facts()).resolution_step is RoutingResolutionStep(step)
    assert route(Proposed(), make_policy(rules=[rule("ask")]), facts()).tier is ActionTier.ALWAYS_APPROVE
    with pytest.raises(ValueError, match="not registered"):
        route(Proposed(), make_policy(), facts(capability=None))
    unknown = answer(make_policy(), facts(capability=None))
    assert unknown.resolution_step is RoutingResolutionStep.CAPABILITY_MATCH


def test_a_capability_may_have_a_lower_autonomy_ceiling_of_its_own(make_policy):
    policy = make_policy(autonomy_ceiling="L3", autonomy_ceiling_by_capability={"mail.send": "L1"})
    assert answer(policy, facts(capability=SEND)).reason is Reason.AUTONOMY_TOO_LOW


CONDITIONS = st.sampled_from(
    [ALWAYS, BIG, CLEAN, {"type": "not", "condition": CLEAN}, {"type": "time_of_day", "end": "11:00"}]
)
RULES = st.lists(
    st.builds(
        lambda then, when, index: {**rule(then, ALWAYS if then == "raise_risk" else when), "id": f"r{index}"},
        st.sampled_from(["deny", "steer", "ask", "raise_risk"]),
        CONDITIONS,
        st.integers(0, 10**6),
    ),
    max_size=4,
    unique_by=lambda each: each["id"],
)
ANSWERS = st.none() | st.fixed_dictionaries(
    {"gate": st.sampled_from(EvaluationStatus), "clean": st.sampled_from(EvaluationStatus)}
)
STRICTNESS = [Verdict.ALLOW, Verdict.ASK, Verdict.STEER, Verdict.DENY]


@given(RULES, ANSWERS, st.dictionaries(st.just("amount"), st.sampled_from([1, 500, "x"])))
def test_from_its_stored_facts_the_identical_decision_is_made(make_policy, rules, answers, arguments):
    policy = make_policy(rules=rules, evaluators=[GATE, LEAF], auto_approve_when=CLEAN)
    known = facts() if answers is None else told(**answers)
    decision = answer(policy, known, **arguments)
    again = answer(
        PolicySnapshot.model_validate_json(policy.model_dump_json()), Facts.from_json(known.to_json()), **arguments
    )
    assert again == decision
    if answers is not None:
        assert not isinstance(decision, Needs)


@given(RULES, RULES, ANSWERS, st.dictionaries(st.just("amount"), st.sampled_from([1, 500, "x"])))
def test_one_rule_more_never_makes_an_answer_milder(make_policy, rules, more, answers, arguments):
    known = told(gate="allowed", clean="allowed") if answers is None else told(**answers)
    taken = {each["id"] for each in rules}
    policies = [
        make_policy(rules=chosen, evaluators=[GATE, LEAF], auto_approve_when=CLEAN)
        for chosen in (rules, rules + [each for each in more if each["id"] not in taken])
    ]
    before, after = (STRICTNESS.index(answer(policy, known, **arguments).outcome) for policy in policies)
    assert after >= before


@given(RULES, ANSWERS)
def test_an_answer_that_fails_never_makes_a_decision_milder(make_policy, rules, answers):
    """Whichever evaluator fails, times out or is cancelled: never an allow that its answer would not have given."""
    policy = make_policy(rules=rules, evaluators=[GATE, LEAF], auto_approve_when=CLEAN)
    known = told(gate="allowed", clean="allowed") if answers is None else told(**answers)
    failed = replace(
        known, evaluations=tuple(replace(each, status=EvaluationStatus.TIMED_OUT) for each in known.evaluations or ())
    )
    assert answer(policy, failed).outcome is Verdict.DENY


# --- the form --------------------------------------------------------------------------------------------------------


def test_tiers_are_written_either_way_and_mean_the_same(make_policy):
    lists = make_policy(tiers={"blocked": ["a.b", "c.d"], "unrestricted": ["e.f"]})
    entries = make_policy(tiers={"a.b": "blocked", "c.d": "blocked", "e.f": "unrestricted"})
    assert lists == entries
    assert lists.digest == entries.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiers": {"blocked": ["a.b"], "steer": ["a.b"]}}, "a.b is both blocked and steer"),
        ({"tiers": {"blocked": "a.b"}}, "blocked needs a list"),
        ({"rules": [rule("ask"), rule("ask")]}, "rules has r-ask twice"),
        ({"evaluators": [GATE, GATE]}, "evaluators has gate twice"),
        ({"rules": [rule("ask", CLEAN)]}, "rules.r-ask.when asks the evaluator clean, which"),
        ({"auto_approve_when": CLEAN}, "auto_approve_when asks the evaluator clean"),
        ({"rules": [rule("steer", guidance="")]}, "guidance goes with then: steer"),
        ({"rules": [rule("deny", guidance="x")]}, "guidance goes with then: steer"),
        ({"rules": [rule("deny", risk="high")]}, "risk goes with then: raise_risk"),
        ({"rules": [rule("raise_risk", CLEAN)], "evaluators": [LEAF]}, "rated before evaluator is known"),
        ({"rules": [rule("raise_risk", {"type": "risk_level", "level": "low"})]}, "rated before risk_level"),
        ({"rules": [{**rule("ask"), "id": "Not A Name"}]}, "pattern"),
        ({"rules": [{**rule("ask"), "capabilities": []}]}, "at least 1 item"),
        ({"rules": [{**rule("ask"), "if": {}}]}, "Extra inputs"),
        ({"evaluators": [{**GATE, "timeout_ms": 0}]}, "greater than 0"),
        ({"risk_floor": {"delete": "high"}}, "'read', 'plan-write' or 'execute-write'"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(make_policy, changes, message):
    with pytest.raises(ValidationError, match=message):
        make_policy(**changes)


def test_a_snapshot_cannot_be_changed(make_policy):
    policy = make_policy(tiers={"a.b": "blocked"})
    for table in (policy.tiers, policy.risk_by_mode, policy.budgets.run):
        with pytest.raises(TypeError):
            table["x"] = "y"
    with pytest.raises(ValidationError):
        policy.tiers = {}


def test_every_member_but_the_unsaid_new_ones_is_part_of_the_digest(make_policy):
    plain = make_policy().digest
    said = {
        "rules": [rule("ask")],
        "evaluators": [GATE],
        "auto_approve_when": ALWAYS,
        "risk_by_capability": {"a.b": "low"},
        "risk_floor": {"read": "low"},
        "autonomy_ceiling_by_capability": {"a.b": "L1"},
    }
    digests = {plain} | {make_policy(**{name: value}).digest for name, value in said.items()}
    assert len(digests) == 1 + len(said)
    assert (
        make_policy(**{name: type(value)() for name, value in said.items() if name != "auto_approve_when"}).digest
        == plain
    )
