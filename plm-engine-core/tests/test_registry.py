"""The register: which version of a capability or an agent counts, what each may, and what may be handed on."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Pending, Principal
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest
from plm_engine_core.control_plane.policy import Facts, PolicySnapshot, decide
from plm_engine_core.control_plane.policy.facts import stored_capability
from plm_engine_core.control_plane.registry import (
    AgentDescriptor,
    AgentRegistry,
    CapabilityDescriptor,
    CapabilityRegistry,
    Delegation,
    load_agents,
    load_capabilities,
    narrowed,
    share_of,
)
from plm_engine_core.control_plane.vocabulary import (
    AgentStatus,
    AutonomyLevel,
    BudgetScope,
    BudgetUnit,
    CapabilityStatus,
    Reason,
    TicketDecision,
)
from pydantic import ValidationError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def capability(**changes):
    base = {"id": "thing.read", "description": "Look", "mode": "read", "plugin": "things"}
    return CapabilityDescriptor.model_validate({**base, **changes})


def agent(**changes):
    return AgentDescriptor.model_validate({"id": "test", "owner": "somebody", **changes})


def test_of_several_versions_the_active_one_counts_else_the_deprecated_one():
    drafts = [capability(version="3", status="draft"), capability(version="0", status="retired")]
    old, now = capability(version="1", status="deprecated"), capability(version="2")
    assert CapabilityRegistry([*drafts, old, now]).get("thing.read") is now
    assert CapabilityRegistry([old, *drafts]).get("thing.read") is old
    assert CapabilityRegistry(drafts).get("thing.read").status is CapabilityStatus.DRAFT
    with pytest.raises(InvalidRequest, match="both active"):
        CapabilityRegistry([now, capability(version="3")])
    with pytest.raises(InvalidRequest, match="registered twice"):
        CapabilityRegistry([now, capability(version="2", status="retired")])


def test_a_capability_says_within_what_its_calls_lock_their_resource(tmp_path):
    none, run, tenant = capability(), capability(lock="run"), capability(lock="tenant")
    assert [each.lock for each in (none, run, tenant)] == [None, "run", "tenant"]
    assert "lock" not in stored_capability(none), "records of before stay as they were"
    assert stored_capability(tenant)["lock"] == "tenant"
    assert CapabilityDescriptor.model_validate(stored_capability(tenant)) == tenant
    path = tmp_path / "capabilities.json"
    for each in (none, run):
        path.write_text(f'{{"capabilities": [{each.model_dump_json()}]}}', encoding="utf-8")
        assert list(load_capabilities(path)) == [each]


@pytest.mark.parametrize(("lock", "says"), [("", "lock is empty; say run or tenant"), ("global", "'run' or 'tenant'")])
def test_a_lock_that_would_lock_nothing_is_refused(tmp_path, lock, says):
    path = tmp_path / "capabilities.yaml"
    written = f"capabilities: [{{id: a.b, description: x, mode: read, plugin: p, lock: {lock}}}]"
    path.write_text(written, encoding="utf-8")
    with pytest.raises(InvalidRequest, match=says):
        load_capabilities(path)


def test_a_capability_that_reaches_a_network_without_a_bound_is_refused():
    with pytest.raises(ValidationError, match=r"cost\.max_eur"):
        capability(network=True)
    with pytest.raises(ValidationError, match=r"cost\.max_eur"):
        capability(network=True, cost={"eur_per_unit": {"token": "0.01"}})
    bounded = capability(network=True, cost={"max_eur": "0"})
    assert CapabilityDescriptor.model_validate(bounded.model_dump(mode="json")) == bounded


def test_of_several_versions_of_an_agent_one_may_be_active():
    old, now = agent(version="1", status="retired"), agent(version="2")
    for order in ([old, now], [now, old]):
        assert AgentRegistry(order).get("test") is now
    assert AgentRegistry([old]).get("test").status is AgentStatus.RETIRED
    assert AgentRegistry([old]).get("else") is None
    with pytest.raises(InvalidRequest, match="both active"):
        AgentRegistry([now, agent(version="3")])
    with pytest.raises(InvalidRequest, match="registered twice"):
        AgentRegistry([now, agent(version="2", status="suspended")])


def test_the_register_of_agents_is_a_file_whose_faults_are_named(tmp_path):
    path = tmp_path / "agents.yaml"
    path.write_text(
        "agents:\n  - {id: test, owner: somebody, autonomy: L1, budget: {EUR: '2'}, tiers: [auto_approve]}\n"
    )
    (found,) = load_agents(path)
    assert (found.autonomy, found.budget) == (AutonomyLevel.L1, {BudgetUnit.EUR: Decimal(2)})
    path.write_text("agents:\n  - {id: test}\n")
    with pytest.raises(InvalidRequest, match="owner"):
        load_agents(path)


def facts(**changes):
    base = {
        "capability": capability(),
        "principal_scopes": frozenset(),
        "requester": uuid.UUID(int=1),
        "autonomy": AutonomyLevel.L3,
        "rate_allowed": True,
        "agent": "test",
        "at": NOW,
    }
    return Facts(**{**base, **changes})


REFUSED = {
    "a draft": ({"capability": capability(status="draft")}, Reason.CAPABILITY_INACTIVE),
    "retired": ({"capability": capability(status="retired")}, Reason.CAPABILITY_INACTIVE),
    "no agent of the register": ({"unregistered": True}, Reason.AGENT_INACTIVE),
    "a suspended agent": ({"registration": agent(status="suspended")}, Reason.AGENT_INACTIVE),
    "another capability": ({"registration": agent(capabilities=["thing.write"])}, Reason.AGENT_CEILING),
    "another tier": ({"registration": agent(tiers=["always_approve"])}, Reason.AGENT_CEILING),
    "an ended delegation": ({"principal_until": NOW}, Reason.DELEGATION_EXPIRED),
    "a delegation at an unknown time": ({"principal_until": NOW, "at": None}, Reason.DELEGATION_EXPIRED),
}
ALLOWED = {
    "nothing registered": {},
    "deprecated": {"capability": capability(status="deprecated")},
    "registered": {"registration": agent(capabilities=["thing.read"], tiers=["auto_approve"])},
    "a delegation": {"principal_until": NOW + timedelta(seconds=1)},
}


class Proposed:
    capability, resource, arguments = "thing.read", "thing/1", {}


@pytest.mark.parametrize("case", [*REFUSED, *ALLOWED])
def test_what_is_registered_bounds_a_decision_which_can_be_made_again_from_its_record(make_policy, case):
    changes, reason = REFUSED.get(case) or (ALLOWED[case], None)
    policy: PolicySnapshot = make_policy()
    decision = decide(Proposed(), policy, facts(**changes))
    assert decision.reason is reason
    if reason is not None:
        assert decision.message
        assert decision.unblock
    recorded = Facts.from_json(facts(**changes).to_json())
    assert recorded == facts(**changes)
    assert decide(Proposed(), policy, recorded) == decision


def test_a_capability_marked_for_approval_is_approved_by_a_human_whatever_its_tier(make_policy):
    for tier in ("auto_approve", "unrestricted", "always_approve"):
        policy = make_policy(tiers={"thing.read": tier})
        assert (
            decide(Proposed(), policy, facts(capability=capability(approval=True))).reason is Reason.APPROVAL_REQUIRED
        )
    blocked = make_policy(tiers={"thing.read": "blocked"})
    assert decide(Proposed(), blocked, facts(capability=capability(approval=True))).reason is Reason.CAPABILITY_BLOCKED


def under(bench, *agents, **changes):
    """The bench with a register of agents."""
    plane = bench.control_plane
    made = ControlPlane(
        policy=plane.policy, registry=plane.registry, storage=plane.storage, agents=AgentRegistry(agents)
    )
    return replace(bench, control_plane=made)


async def test_only_registered_and_active_agents_run_and_none_above_its_ceilings(bench):
    for registered in ([], [agent(id="another")], [agent(status="suspended")]):
        with pytest.raises(Forbidden, match="agent test is"):
            await under(bench, *registered).run()
    ceiling = under(bench, agent(autonomy="L1", budget={"EUR": "0.60"}, tiers=["auto_approve", "always_approve"]))
    lease = await ceiling.lease()
    budgets = await bench.storage.runs.budgets(bench.tenant, lease.run.id)
    assert [each.limit for each in budgets if (each.scope, each.unit) == (BudgetScope.RUN, BudgetUnit.EUR)] == [
        Decimal("0.60")
    ]
    assert isinstance(await ceiling.control_plane.admit(ceiling.proposal(lease, agent="test")), Granted)
    write = ceiling.proposal(lease, agent="test", capability="thing.write", step_index=1, step_id="second")
    denied = await ceiling.control_plane.admit(write)
    assert isinstance(denied, Denied)
    assert denied.reason is Reason.AUTONOMY_TOO_LOW


async def test_an_agent_that_is_suspended_meanwhile_proposes_nothing_more(bench):
    lease = await under(bench, agent()).lease()
    suspended = under(bench, agent(status="suspended"))
    denied = await suspended.control_plane.admit(suspended.proposal(lease, agent="test"))
    assert isinstance(denied, Denied)
    assert (denied.reason, "somebody owns it" in denied.message) == (Reason.AGENT_INACTIVE, True)


SCOPES = st.frozensets(st.sampled_from(["a", "b", "c"]))


def principal(**changes):
    return Principal(**{"user_id": uuid.UUID(int=1), "actor_kind": "human", "scopes": frozenset("abc"), **changes})


@given(
    st.lists(
        st.tuples(SCOPES, st.integers(2, 5), st.integers(-1, 4), st.integers(-3, 30), st.integers(0, 3)), max_size=6
    )
)
def test_whatever_is_handed_on_again_and_again_only_narrows(hops):
    """A slow oracle: each principal of a chain may do no more, no longer and no further than the one before it."""
    holder, depth = principal(), 4
    for scopes, to, again, minutes, _ in hops:
        terms = Delegation(
            to=uuid.UUID(int=to),
            scopes=scopes,
            share=Decimal("0.5"),
            expires_at=NOW + timedelta(minutes=minutes),
            delegations=max(again, 0),
        )
        try:
            made = narrowed(holder, terms, depth=depth, now=NOW)
        except Forbidden:
            continue
        before = depth if holder.delegations_left is None else min(depth, holder.delegations_left)
        assert made.scopes <= holder.scopes
        assert made.delegations_left < before
        assert NOW < made.expires_at <= (holder.expires_at or made.expires_at)
        assert made.user_id not in (holder.user_id, *holder.delegated_by)
        assert made.delegated_by == (*holder.delegated_by, holder.user_id)
        assert Principal.from_json(made.to_json()) == made
        holder = made
    assert len(holder.delegated_by) <= depth


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"scopes": frozenset({"a", "d"})}, "the delegator lacks d"),
        ({"expires_at": NOW + timedelta(minutes=11)}, "the delegator's own delegation ends at"),
        ({"expires_at": NOW}, "it has ended already"),
        ({"delegations": 2}, "it may be handed on 1 more times at most"),
        ({"to": uuid.UUID(int=1)}, "delegated this itself"),
        ({"to": uuid.UUID(int=9)}, "delegated this itself"),
    ],
    ids=range(6),
)
def test_handing_on_more_in_any_one_way_is_refused(more, words):
    holder = principal(
        scopes=frozenset({"a", "b"}),
        delegated_by=(uuid.UUID(int=9),),
        expires_at=NOW + timedelta(minutes=10),
        delegations_left=2,
    )
    terms = Delegation(
        to=uuid.UUID(int=2),
        scopes=frozenset({"a"}),
        share=Decimal(1),
        expires_at=NOW + timedelta(minutes=10),
        delegations=1,
    )
    assert narrowed(holder, terms, depth=4, now=NOW).scopes == {"a"}
    with pytest.raises(Forbidden, match=words):
        narrowed(holder, replace(terms, **more), depth=4, now=NOW)
    with pytest.raises(Forbidden, match="may not delegate further"):
        narrowed(replace(holder, delegations_left=0), replace(terms, delegations=0), depth=4, now=NOW)
    with pytest.raises(Forbidden, match="may not delegate further"):
        narrowed(holder, replace(terms, delegations=0), depth=0, now=NOW)


@pytest.mark.parametrize("share", ["0", "-1", "1.01", "NaN", "Infinity"])
def test_a_share_is_part_of_a_whole(share):
    terms = Delegation(to=uuid.UUID(int=2), scopes=frozenset(), share=Decimal(share), expires_at=NOW)
    with pytest.raises(InvalidRequest, match="share"):
        share_of({BudgetUnit.EUR: Decimal(3)}, terms)


def test_a_share_is_never_rounded_up():
    terms = Delegation(to=uuid.UUID(int=2), scopes=frozenset(), share=Decimal("0.6666666666667"), expires_at=NOW)
    assert share_of({BudgetUnit.EUR: Decimal("0.00000001"), BudgetUnit.CALLS: Decimal(3)}, terms) == {
        BudgetUnit.EUR: 0,
        BudgetUnit.CALLS: Decimal(2),
    }


async def test_a_delegated_run_has_its_share_of_what_is_left_and_ends_with_its_delegation(bench):
    lease = await bench.lease()
    await bench.begun(lease)  # 0.50 EUR of 5 are set aside
    terms = Delegation(
        to=uuid.uuid4(),
        scopes=frozenset({"plm.runs.create", "things.read"}),
        share=Decimal("0.5"),
        expires_at=datetime.now(UTC) + timedelta(hours=1),
    )
    child, _ = await bench.control_plane.delegate(lease.run, terms, bench.request())
    assert child.principal.delegated_by == (bench.requester.user_id,)
    limits = {
        each.unit: each.limit
        for each in await bench.storage.runs.budgets(bench.tenant, child.id)
        if each.scope is BudgetScope.RUN
    }
    assert limits == {BudgetUnit.EUR: Decimal("2.25"), BudgetUnit.CALLS: Decimal("24.5")}
    held = await bench.lease(child)
    assert isinstance(await bench.control_plane.admit(bench.proposal(held)), Granted)
    refused = await bench.control_plane.admit(
        bench.proposal(held, capability="thing.write", step_index=1, step_id="second")
    )
    assert isinstance(refused, Denied)
    assert refused.reason is Reason.MISSING_SCOPES
    over = replace(child.principal, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    late = await bench.control_plane.admit(bench.proposal(held, principal=over, step_index=2, step_id="third"))
    assert isinstance(late, Denied)
    assert late.reason is Reason.DELEGATION_EXPIRED
    with pytest.raises(Forbidden, match="delegation is refused") as refused:
        await bench.control_plane.delegate(child, replace(terms, to=uuid.uuid4()), bench.request())
    assert refused.value.reason == "delegation_too_wide"


@pytest.mark.parametrize(
    ("terms", "budget", "message"),
    [
        ({"share": Decimal("1.01")}, {}, r"'share' must be .* not Decimal\('1.01'\)"),
        ({"share": 0.5}, {}, r"'share' must be a Decimal .* not 0\.5"),
        ({"delegations": -1}, {}, "'delegations' must be a whole number from 0 up, not -1"),
        ({"delegations": 0.5}, {}, "'delegations' must be a whole number from 0 up, not 0.5"),
        ({}, {"tokens": Decimal(1)}, "the delegator has a budget in .*EUR.*, not 'tokens'"),
        ({}, {"EUR": Decimal("NaN")}, r"'budget\.EUR' must be a number"),
        ({}, {"EUR": "2"}, r"'budget\.EUR' must be a number"),
    ],
)
async def test_terms_that_are_no_numbers_and_units_that_nobody_gave_are_refused_by_name(bench, terms, budget, message):
    good = {"scopes": frozenset({"plm.runs.create"}), "share": Decimal(1)}
    handed = Delegation(**{**good, "to": uuid.uuid4(), "expires_at": datetime.now(UTC) + timedelta(hours=1), **terms})
    run = await bench.run()
    with pytest.raises(InvalidRequest, match=message):
        await bench.control_plane.delegate(run, handed, replace(bench.request(), budget=budget))


async def test_who_had_a_call_requested_by_delegation_does_not_approve_it(bench):
    terms = Delegation(
        to=uuid.uuid4(),
        scopes=frozenset({"plm.runs.create", "things.write"}),
        share=Decimal(1),
        expires_at=datetime.now(UTC) + timedelta(hours=1),
    )
    child, _ = await bench.control_plane.delegate(await bench.run(), terms, bench.request())
    held = await bench.lease(child)
    pending = await bench.control_plane.admit(bench.proposal(held, capability="thing.write"))
    assert isinstance(pending, Pending)
    with pytest.raises(Forbidden, match="requester"):
        await bench.decide(pending, TicketDecision.APPROVE, approver=bench.requester)
