"""The decision as a pure function: which stage refuses what, in which order, and how a decision is made again."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.policy import Facts, PolicySnapshot, Verdict
from plm_engine_core.control_plane.policy import decide as decide_proposal
from plm_engine_core.control_plane.policy.facts import stored_capability
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CostBound
from plm_engine_core.control_plane.vocabulary import (
    PIPELINE_ORDER,
    ActionTier,
    AutonomyLevel,
    BudgetUnit,
    CapabilityMode,
    CapabilityStatus,
    Reason,
    RiskLevel,
    Stage,
    TenantAccess,
)
from pydantic import ValidationError

READ, PLAN, WRITE = CapabilityMode.READ, CapabilityMode.PLAN_WRITE, CapabilityMode.EXECUTE_WRITE


def capability(mode: CapabilityMode = READ, **changes) -> CapabilityDescriptor:
    values = {"id": "thing.use", "description": "x", "mode": mode, "plugin": "things", "certified": True}
    return CapabilityDescriptor(**{**values, **changes})


def facts(**changes) -> Facts:
    values = {
        "capability": capability(),
        "principal_scopes": frozenset(),
        "requester": uuid.UUID(int=1),
        "autonomy": AutonomyLevel.L3,
        "rate_allowed": True,
    }
    return Facts(**{**values, **changes})


@dataclass(frozen=True)
class Proposed:
    """What is proposed, where only the policy and the facts matter."""

    capability: str = "thing.use"
    resource: str = "thing/1"
    arguments: Mapping[str, Any] = field(default_factory=dict)


def decide(policy, known, proposal=Proposed()):
    return decide_proposal(proposal, policy, known)


REFUSALS = [
    (Stage.RATE_LIMIT, Reason.RATE_LIMIT_EXCEEDED),
    (Stage.AUTHORIZATION, Reason.MISSING_SCOPES),
    (Stage.AUTONOMY_GATING, Reason.AUTONOMY_TOO_LOW),
    (Stage.CLASSIFY, Reason.CAPABILITY_BLOCKED),
    (Stage.COST_BUDGET, Reason.BUDGET_EXCEEDED),
]


@pytest.mark.parametrize("first", range(len(REFUSALS)), ids=[stage.value for stage, _ in REFUSALS])
def test_the_first_stage_that_refuses_gives_the_reason_and_ends_the_walk(make_policy, first):
    """Everything from `first` on would refuse; only `first` is heard."""
    bad = [index >= first for index in range(len(REFUSALS))]
    policy = make_policy(
        autonomy_ceiling="L1" if bad[2] else "L3",
        tiers={"thing.use": "blocked"} if bad[3] else {},
        max_eur_per_call="1",
    )
    decision = decide(
        policy,
        facts(
            rate_allowed=not bad[0],
            retry_after_ms=700 if bad[0] else 0,
            capability=capability(
                WRITE,
                required_scopes=frozenset({"things.use"}) if bad[1] else frozenset(),
                cost=CostBound(max_eur=Decimal(2)),
            ),
        ),
    )
    stage, reason = REFUSALS[first]
    assert (decision.outcome, decision.reason) == (Verdict.DENY, reason)
    assert [each.stage for each in decision.stages] == [stage for stage, _ in REFUSALS[: first + 1]]
    assert [each.passed for each in decision.stages] == [True] * first + [False]
    assert decision.stages[-1].stage is stage
    assert decision.retry_after_ms == (700 if first == 0 else 0)
    assert decision.reserve == {}


def test_the_published_order_is_the_order_walked(make_policy):
    walked = [each.stage for each in decide(make_policy(), facts()).stages]
    assert [stage for stage in walked if stage in PIPELINE_ORDER] == list(PIPELINE_ORDER)
    assert [stage.value for stage in PIPELINE_ORDER] == [
        "rate_limit",
        "authorization",
        "autonomy_gating",
        "cost_budget",
    ]


def test_an_unknown_capability_is_refused_at_authorization(make_policy):
    decision = decide(make_policy(), facts(capability=None))
    assert decision.reason is Reason.CAPABILITY_UNKNOWN
    assert decision.stages[-1].stage is Stage.AUTHORIZATION


def test_a_refusal_names_every_missing_scope(make_policy):
    needs = capability(required_scopes=frozenset({"b.scope", "a.scope", "have"}))
    decision = decide(make_policy(), facts(capability=needs, principal_scopes=frozenset({"have"})))
    assert decision.message.endswith("a.scope, b.scope")


# Rows: autonomy; then what is allowed for read, plan-write, uncertified write, certified write the policy asks about,
# certified write it does not ask about.
AUTONOMY = {"L1": "ynnnn", "L2": "yynyn", "L3": "yyyyy"}
CALLS = [
    (READ, False, "always_approve"),
    (PLAN, False, "always_approve"),
    (WRITE, False, "always_approve"),
    (WRITE, True, "always_approve"),
    (WRITE, True, "unrestricted"),
]


@pytest.mark.parametrize("requested", AUTONOMY)
@pytest.mark.parametrize("ceiling", AUTONOMY)
def test_autonomy_reaches_as_far_as_the_lower_of_request_and_ceiling(make_policy, requested, ceiling):
    allowed = ""
    for mode, certified, tier in CALLS:
        policy = make_policy(autonomy_ceiling=ceiling, tiers={"thing.use": tier})
        decision = decide(
            policy, facts(capability=capability(mode, certified=certified), autonomy=AutonomyLevel(requested))
        )
        allowed += "n" if decision.reason is Reason.AUTONOMY_TOO_LOW else "y"
    assert allowed == AUTONOMY[min(requested, ceiling)]


@pytest.mark.parametrize("mode", list(CapabilityMode))
@pytest.mark.parametrize("highest", list(RiskLevel))
@pytest.mark.parametrize("risk", list(RiskLevel))
@pytest.mark.parametrize("tier", list(ActionTier))
def test_tier_and_risk_say_who_decides(make_policy, tier, risk, highest, mode):
    policy = make_policy(
        autonomy_ceiling="L3",
        tiers={"thing.use": tier},
        guidance={"thing.use": "read it instead"},
        risk_by_mode=dict.fromkeys(CapabilityMode, risk),
        auto_approve_max_risk=highest,
    )
    decision = decide(policy, facts(capability=capability(mode)))
    by_risk = Verdict.ALLOW if risk.rank <= highest.rank else Verdict.ASK
    expected = {
        ActionTier.BLOCKED: (Verdict.DENY, Reason.CAPABILITY_BLOCKED),
        ActionTier.ALWAYS_APPROVE: (Verdict.ASK, Reason.APPROVAL_REQUIRED),
        ActionTier.STEER: (Verdict.STEER, Reason.STEERED),
        ActionTier.AUTO_APPROVE: (by_risk, None if by_risk is Verdict.ALLOW else Reason.APPROVAL_REQUIRED),
        ActionTier.UNRESTRICTED: (Verdict.ALLOW, None),
    }[tier]
    assert (decision.outcome, decision.reason) == expected
    assert decision.guidance == ("read it instead" if tier is ActionTier.STEER else "")
    if decision.outcome in (Verdict.ALLOW, Verdict.ASK):
        assert decision.reserve == {BudgetUnit.EUR: 0, BudgetUnit.CALLS: 1}


def test_a_capability_without_a_tier_of_its_own_is_treated_by_its_mode(make_policy):
    policy = make_policy(tier_by_mode={"read": "unrestricted", "plan-write": "blocked", "execute-write": "blocked"})
    assert decide(policy, facts()).outcome is Verdict.ALLOW
    assert decide(policy, facts(capability=capability(PLAN))).outcome is Verdict.DENY


def test_under_l2_a_steered_write_gets_its_guidance_and_a_blocked_one_its_reason(make_policy):
    guided = make_policy(tiers={"thing.use": "steer"}, guidance={"thing.use": "plan it"})
    assert decide(guided, facts(capability=capability(WRITE))).guidance == "plan it"
    blocked = decide(make_policy(tiers={"thing.use": "blocked"}), facts(capability=capability(WRITE)))
    assert blocked.reason is Reason.CAPABILITY_BLOCKED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiers": {"thing.use": "steer"}}, "guidance is missing for the steered capabilities thing.use"),
        ({"tiers": {"thing.use": "steer"}, "guidance": {"thing.use": ""}}, "guidance"),
        (
            {"tier_by_mode": {"read": "steer", "plan-write": "blocked", "execute-write": "blocked"}},
            "tier_by_mode cannot steer",
        ),
        ({"tier_by_mode": {"read": "blocked"}}, "tier_by_mode has no entry for plan-write, execute-write"),
        ({"risk_by_mode": {"read": "low"}}, "risk_by_mode has no entry for plan-write, execute-write"),
        ({"budgets": {"run": {"EUR": 1}, "tenant": {"EUR": 1, "calls": 1}}}, "a limit is missing for calls"),
        ({"max_eur_per_call": "-1"}, "max_eur_per_call"),
        ({"max_eur_per_call": "NaN"}, "max_eur_per_call"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_policy_that_leaves_something_open_is_refused(make_policy, changes, message):
    with pytest.raises(ValidationError, match=message):
        make_policy(**changes)


def test_equal_policies_have_equal_digests_and_others_do_not(make_policy):
    one = make_policy(tiers={"a.b": "blocked", "c.d": "blocked"}, max_eur_per_call="2.50")
    same = make_policy(tiers={"c.d": "blocked", "a.b": "blocked"}, max_eur_per_call="2.5")
    assert one == same
    assert one.digest == same.digest
    assert one.digest != make_policy(tiers={"a.b": "blocked"}, max_eur_per_call="2.50").digest
    assert len({make_policy(version=version).digest for version in ("1", "2", "3")}) == 3


def test_the_digest_is_the_same_in_every_process(make_policy):
    """A literal, so that a change of the canonical form is noticed: it would invalidate open approvals."""
    assert make_policy().digest == "a7da61b4de592607ddd2aecfe30c8878edf65ae2b460153f578a11e39a147ff6"


RECORDED = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "recorded_decisions.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("record", RECORDED, ids=range(len(RECORDED)))
def test_a_decision_recorded_by_the_first_release_is_made_again_under_the_same_digest(record):
    """Written before rules, conditions and evaluators existed; what is newer in an answer only adds to it."""
    policy = PolicySnapshot.model_validate(record["policy"])
    assert policy.digest == record["digest"]
    again = decide(policy, Facts.from_json(record["facts"])).to_json()
    assert {key: again.get(key) for key in record["decision"]} == record["decision"]


amounts = st.decimals(min_value=0, max_value=10**6, places=4)
scopes = st.frozensets(st.sampled_from(["a", "b", "c"]))
capabilities = st.builds(
    capability,
    mode=st.sampled_from(CapabilityMode),
    certified=st.booleans(),
    required_scopes=scopes,
    idempotent=st.booleans(),
    security_relevant=st.lists(st.text(max_size=4), max_size=2).map(tuple),
    network=st.booleans(),
    cost=st.builds(CostBound, max_eur=amounts),
    status=st.just(CapabilityStatus.ACTIVE) | st.sampled_from(CapabilityStatus),
    allowed_tenants=st.none() | st.frozensets(st.uuids(), min_size=1, max_size=3),
)
all_facts = st.builds(
    Facts,
    capability=st.none() | capabilities,
    principal_scopes=scopes,
    requester=st.uuids(),
    autonomy=st.sampled_from(AutonomyLevel),
    rate_allowed=st.booleans(),
    retry_after_ms=st.integers(0, 10**6),
    tenant_access=st.none() | st.sampled_from(TenantAccess),
)


def per_mode(values):
    return st.fixed_dictionaries({mode: st.sampled_from(values) for mode in CapabilityMode})


policies = st.builds(
    PolicySnapshot,
    version=st.just("1"),
    tiers=st.dictionaries(st.just("thing.use"), st.sampled_from(ActionTier)),
    tier_by_mode=per_mode([tier for tier in ActionTier if tier is not ActionTier.STEER]),
    risk_by_mode=per_mode(list(RiskLevel)),
    guidance=st.just({"thing.use": "do something else"}),
    auto_approve_max_risk=st.sampled_from(RiskLevel),
    autonomy_ceiling=st.sampled_from(AutonomyLevel),
    budgets=st.fixed_dictionaries(
        {scope: st.fixed_dictionaries(dict.fromkeys(BudgetUnit, amounts)) for scope in ("run", "tenant")}
    ),
    max_eur_per_call=st.none() | amounts,
)


@given(policies, all_facts)
def test_a_recorded_decision_is_made_again_from_its_stored_facts(policy, known):
    """Deterministic, never an exception, and nothing but the stored facts matters."""
    decision = decide(policy, known)
    stored = json.loads(json.dumps(known.to_json()))
    again = decide(PolicySnapshot.model_validate_json(policy.model_dump_json()), Facts.from_json(stored))
    assert again == decision
    assert json.loads(json.dumps(again.to_json())) == json.loads(json.dumps(decision.to_json()))


def test_of_a_capability_only_what_is_its_own_is_recorded_and_what_is_left_out_never_changes():
    """A default is part of every record that leaves it out: another one would change what was decided."""
    plain = {"id": "thing.use", "description": "x", "mode": "read", "plugin": "things"}
    assert stored_capability(CapabilityDescriptor(**plain)) == plain
    assert CapabilityDescriptor(**plain).model_dump(mode="json", exclude=set(plain)) == {
        "version": "1",
        "status": "active",
        "certified": False,
        "idempotent": False,
        "stateless": False,
        "network": False,
        "approval": False,
        "required_scopes": [],
        "security_relevant": [],
        "model_argument": "",
        "cost": {"max_eur": "0", "max_usage": {}, "eur_per_unit": {}},
        "timeout_seconds": 300.0,
    }
    free = CapabilityDescriptor(**plain, network=True, cost=CostBound(max_eur=Decimal(0)))
    assert CapabilityDescriptor.model_validate(stored_capability(free)) == free


def test_what_one_record_of_a_decision_is_given_besides_is_in_no_other(make_policy):
    decision = decide(make_policy(), facts())
    decision.to_json()["facts"] = "of the first call"
    assert "facts" not in decision.to_json()


@given(policies, all_facts)
def test_nothing_is_allowed_that_a_stage_refused(policy, known):
    decision = decide(policy, known)
    refused = not all(stage.passed for stage in decision.stages)
    assert (decision.outcome is Verdict.DENY) == refused
    if decision.outcome is Verdict.ALLOW:
        assert known.capability is not None
        assert known.capability.required_scopes <= known.principal_scopes
        assert known.rate_allowed


@given(policies, all_facts, scopes)
def test_a_principal_with_fewer_scopes_is_never_allowed_more(policy, known, fewer):
    weaker = replace(known, principal_scopes=known.principal_scopes & fewer)
    if decide(policy, known).outcome is Verdict.DENY:
        assert decide(policy, weaker).outcome is Verdict.DENY
