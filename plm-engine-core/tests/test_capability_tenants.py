"""A capability for some tenants, or for all but some: who may use it, what is recorded, and who may use a draft."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Pending
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import Facts, decide
from plm_engine_core.control_plane.policy.facts import stored_capability
from plm_engine_core.control_plane.policy.trials import Trial
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, load_capabilities
from plm_engine_core.control_plane.vocabulary import AutonomyLevel, Reason, TenantAccess, TicketDecision
from pydantic import ValidationError

pytestmark = pytest.mark.every_storage

ONE, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)
PLAIN = {"id": "thing.read", "description": "Look", "mode": "read", "plugin": "things"}
REFUSED = {
    Reason.DENIED_TENANT: ("capability.denied_tenants", "taking the tenant off the capability's denied_tenants"),
    Reason.NOT_ALLOWED_TENANT: ("capability.allowed_tenants", "putting the tenant on the capability's allowed_tenants"),
}


def capability(**changes):
    return CapabilityDescriptor.model_validate({**PLAIN, **changes})


def facts(described, **changes):
    base = {"principal_scopes": frozenset(), "requester": ONE, "autonomy": AutonomyLevel.L3, "rate_allowed": True}
    return Facts(capability=described, **{**base, **changes})


def registered(bench, *capabilities):
    plane = bench.control_plane
    made = ControlPlane(policy=plane.policy, registry=CapabilityRegistry(capabilities), storage=plane.storage)
    return replace(bench, control_plane=made)


class Proposed:
    capability, resource, arguments = "thing.read", "thing/1", {}


@pytest.mark.parametrize(
    ("named", "others_reason"),
    [("denied_tenants", Reason.DENIED_TENANT), ("allowed_tenants", Reason.NOT_ALLOWED_TENANT)],
)
async def test_a_call_of_a_tenant_that_may_not_use_it_is_refused_for_its_own_reason(bench, named, others_reason):
    other = bench.in_tenant(bench.behind.new_tenant())
    refused, allowed = (bench, other) if named == "denied_tenants" else (other, bench)
    refused, allowed = (registered(each, capability(**{named: [bench.tenant]})) for each in (refused, allowed))
    lease = await allowed.lease()
    assert isinstance(await allowed.control_plane.admit(allowed.proposal(lease)), Granted)
    lease = await refused.lease()
    denied = await refused.control_plane.admit(refused.proposal(lease))
    assert isinstance(denied, Denied)
    assert denied.reason is others_reason
    assert (denied.rule, denied.unblock) == REFUSED[others_reason]
    assert denied.message == "capability thing.read is not for this tenant"


async def test_the_record_says_what_came_of_it_names_no_tenant_and_decides_the_same_again(bench, make_policy):
    other = bench.behind.new_tenant()
    for step, named in enumerate(({"allowed_tenants": [other]}, {"allowed_tenants": [bench.tenant, other]})):
        here = registered(bench, capability(**named))
        lease = await here.lease()
        await here.control_plane.admit(here.proposal(lease))
        (recorded,) = await here.storage.runs.steps(here.tenant, lease.run.id)
        stored = recorded.decision["facts"]
        assert stored["tenant_access"] == ("not_allowed_tenant", "allowed_tenant")[step]
        assert str(other) not in json.dumps(recorded.decision, default=str)
        again = decide(Proposed(), make_policy(), Facts.from_json(stored))
        assert {key: recorded.decision[key] for key in again.to_json()} == json.loads(json.dumps(again.to_json()))


async def test_an_approval_is_of_no_use_to_a_tenant_that_was_denied_meanwhile(bench):
    lease, pending = await registered(bench, capability(id="thing.write", mode="execute-write", certified=True)).ask()
    await bench.decide(pending, TicketDecision.APPROVE)
    written = {"id": "thing.write", "mode": "execute-write", "certified": True, "denied_tenants": [bench.tenant]}
    denying = registered(bench, capability(**written))
    lease = await bench.lease(lease.run)
    approved = bench.proposal(lease, capability="thing.write", ticket_id=pending.ticket_id)
    denied = await denying.control_plane.admit(approved)
    assert isinstance(denied, Denied)
    assert denied.reason is Reason.DENIED_TENANT


async def test_a_draft_is_for_the_tenants_that_it_names_and_for_nobody_else(bench):
    asks = capability(status="draft", version="2", approval=True, allowed_tenants=[bench.tenant])
    trying = registered(bench, asks)
    assert isinstance(await trying.control_plane.admit(trying.proposal(await trying.lease())), Pending)
    elsewhere = trying.in_tenant(bench.behind.new_tenant())
    refused = await elsewhere.control_plane.admit(elsewhere.proposal(await elsewhere.lease()))
    assert (type(refused), refused.reason) == (Denied, Reason.NOT_ALLOWED_TENANT)
    for nobody in (capability(status="draft"), capability(status="draft", denied_tenants=[OTHER])):
        closed = registered(bench, nobody)
        refused = await closed.control_plane.admit(closed.proposal(await closed.lease()))
        assert (type(refused), refused.reason) == (Denied, Reason.CAPABILITY_INACTIVE)
    retired = registered(bench, capability(status="retired", allowed_tenants=[bench.tenant]))
    refused = await retired.control_plane.admit(retired.proposal(await retired.lease()))
    assert (type(refused), refused.reason) == (Denied, Reason.CAPABILITY_INACTIVE)


def test_a_draft_for_some_counts_before_one_for_nobody_and_after_what_is_active():
    offered, closed = capability(status="draft", version="2", allowed_tenants=[ONE]), capability(status="draft")
    for order in ([offered, closed], [closed, offered]):
        assert CapabilityRegistry(order).get("thing.read") is offered
    active = capability(version="3")
    assert CapabilityRegistry([active, offered]).get("thing.read") is active
    with pytest.raises(InvalidRequest, match=r"2 and 4 of capability thing\.read are both draft"):
        CapabilityRegistry([offered, closed, capability(status="draft", version="4", allowed_tenants=[OTHER])])


@pytest.mark.parametrize(
    ("written", "field", "words"),
    [
        ({"allowed_tenants": [str(ONE)], "denied_tenants": [str(OTHER)]}, "denied_tenants", "keep one of the two"),
        ({"allowed_tenants": []}, "allowed_tenants", "at least 1 item"),
        ({"denied_tenants": []}, "denied_tenants", "at least 1 item"),
        ({"allowed_tenants": None}, "allowed_tenants", "name at least one tenant"),
        ({"denied_tenants": None}, "denied_tenants", "name at least one tenant"),
        ({"allowed_tenants": ["acme"]}, "allowed_tenants", "UUID"),
        ({"allowed_tenants": str(ONE)}, "allowed_tenants", "must be a list"),
    ],
    ids=["both", "nobody", "nobody denied", "an empty line", "an empty line of the denied", "a name", "no list"],
)
def test_a_definition_that_says_for_whom_in_no_one_way_is_refused_by_its_field(tmp_path, written, field, words):
    path = tmp_path / "capabilities.yaml"
    path.write_text(yaml.safe_dump({"capabilities": [{**PLAIN, **written}]}), encoding="utf-8")
    with pytest.raises(InvalidRequest) as refused:
        load_capabilities(path)
    assert field in str(refused.value)
    assert words in str(refused.value)
    assert path.name in str(refused.value)


def test_a_definition_is_read_back_as_it_was_and_an_empty_list_opens_nothing():
    for named in ({}, {"allowed_tenants": [ONE]}, {"denied_tenants": [ONE, OTHER]}):
        written = capability(**named)
        assert CapabilityDescriptor.model_validate(written.model_dump(mode="json")) == written
        assert stored_capability(written) == PLAIN
    with pytest.raises(ValidationError, match="allowed_tenants"):
        capability(allowed_tenants=frozenset())


def test_definitions_that_are_written_to_a_file_are_read_from_it(tmp_path: Path):
    written = [capability(), capability(id="thing.some", allowed_tenants=[ONE])]
    path = tmp_path / "capabilities.json"
    path.write_text('{"capabilities": [' + ", ".join(each.model_dump_json() for each in written) + "]}")
    assert list(load_capabilities(path)) == written


def test_where_nobody_said_of_which_tenant_a_call_is_it_is_refused_and_so_it_is_again(make_policy):
    for named in ({"allowed_tenants": [ONE]}, {"denied_tenants": [ONE]}):
        unsaid = facts(capability(**named))
        decision = decide(Proposed(), make_policy(), unsaid)
        assert decision.reason is Reason.NOT_ALLOWED_TENANT
        assert decide(Proposed(), make_policy(), Facts.from_json(unsaid.to_json())) == decision


def test_what_names_no_tenants_is_recorded_as_it_always_was():
    assert "tenant_access" not in facts(capability()).to_json()
    assert Facts.from_json(facts(capability()).to_json()).access is None


def test_a_tenant_sees_what_is_for_it_without_the_names_of_others():
    assert capability().seen_by(ONE) == capability()
    assert capability(allowed_tenants=[ONE, OTHER]).seen_by(ONE) == capability(allowed_tenants=[ONE])
    assert capability(denied_tenants=[OTHER]).seen_by(ONE) == capability()
    assert capability(allowed_tenants=[OTHER]).seen_by(ONE) is None
    assert capability(denied_tenants=[ONE]).seen_by(ONE) is None


def test_a_trial_is_of_a_tenant_that_may_use_it_unless_it_names_one():
    restricted = capability(allowed_tenants=[ONE])
    given = Trial(capability="thing.read")
    assert given.facts(restricted).access is TenantAccess.ALLOWED
    assert given.facts(capability(denied_tenants=[ONE])).access is TenantAccess.NOT_DENIED
    assert given.facts(capability()).access is None
    assert given.model_copy(update={"tenant_id": OTHER}).facts(restricted).access is TenantAccess.NOT_ALLOWED
