"""Registered agents: how they stand in a tenant, and that suspending one is an act with its right and its record."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, Granted
from plm_engine_core.control_plane.errors import Conflict, Forbidden, InvalidRequest, NotFound
from plm_engine_core.control_plane.events import TENANT_STREAM
from plm_engine_core.control_plane.registry import AgentDescriptor, AgentRegistry
from plm_engine_core.control_plane.vocabulary import AgentStatus, Reason

pytestmark = pytest.mark.every_storage

AGENTS = AgentRegistry(
    [
        AgentDescriptor(id="test", owner="somebody"),
        AgentDescriptor(id="new", owner="somebody"),
        AgentDescriptor(id="old", owner="somebody", status=AgentStatus.RETIRED),
        AgentDescriptor(id="test", version="0", owner="nobody", status=AgentStatus.RETIRED),
    ]
)
SUSPENDED, ACTIVE = AgentStatus.SUSPENDED, AgentStatus.ACTIVE


@pytest.fixture
def registering(bench: Any) -> Any:
    """A bench where agents are registered."""
    plane = bench.control_plane
    with_agents = ControlPlane(policy=plane.policy, registry=plane.registry, storage=plane.storage, agents=AGENTS)
    return replace(bench, control_plane=with_agents)


async def set_status(bench: Any, agent: str, status: AgentStatus, reason: str = "it loops", by: Any = None) -> Any:
    return await bench.control_plane.set_agent_status(
        bench.tenant, agent, status, reason=reason, by=by or bench.approver
    )


async def standing(bench: Any) -> dict[tuple[str, str], AgentStatus]:
    found = await bench.control_plane.registered_agents(bench.tenant)
    return {(each.descriptor.id, each.descriptor.version): each.status for each in found}


async def test_a_suspended_agent_proposes_nothing_until_it_may_work_again(registering: Any) -> None:
    lease = await registering.lease()
    for _ in range(2):
        assert (await set_status(registering, "test", SUSPENDED)).status is SUSPENDED
    denied = await registering.control_plane.admit(registering.proposal(lease, agent="test"))
    assert isinstance(denied, Denied)
    assert denied.reason is Reason.HALTED
    assert "it loops" in denied.message
    for _ in range(2):
        assert (await set_status(registering, "test", ACTIVE)).status is ACTIVE
    again = registering.proposal(lease, agent="test", attempt=2)
    assert isinstance(await registering.control_plane.admit(again), Granted)


async def test_every_version_is_shown_as_it_stands_in_the_tenant_that_asks(registering: Any) -> None:
    await set_status(registering, "new", SUSPENDED)  # before its first run, too
    registered = {("test", "1"): ACTIVE, ("old", "1"): AgentStatus.RETIRED, ("test", "0"): AgentStatus.RETIRED}
    assert await standing(registering) == {**registered, ("new", "1"): SUSPENDED}
    assert await standing(registering.other()) == {**registered, ("new", "1"): ACTIVE}


async def test_both_acts_are_events_with_their_author_and_the_agent_s_name(registering: Any) -> None:
    await set_status(registering, "test", SUSPENDED)
    await set_status(registering, "test", ACTIVE)
    told = await registering.storage.events.read(registering.tenant, TENANT_STREAM)
    acts = [(each.kind, each.actor, each.data["subject"]) for each in told if each.kind.startswith("halt_")]
    by = registering.approver.actor
    assert acts == [("halt_triggered", by, "test"), ("halt_lifted", by, "test")]


async def test_who_may_not_and_what_only_the_register_says_is_refused(registering: Any) -> None:
    nobody = replace(registering.approver, scopes=frozenset())
    await set_status(registering, "test", SUSPENDED)
    for agent, status in (("new", SUSPENDED), ("test", ACTIVE)):
        with pytest.raises(Forbidden):
            await set_status(registering, agent, status, by=nobody)
    with pytest.raises(InvalidRequest, match="reason"):
        await set_status(registering, "new", SUSPENDED, reason=" ")
    with pytest.raises(InvalidRequest, match="register"):
        await set_status(registering, "test", AgentStatus.RETIRED)
    with pytest.raises(Conflict) as refused:
        await set_status(registering, "old", ACTIVE)
    assert refused.value.reason == "agent_inactive"
    with pytest.raises(NotFound):
        await set_status(registering, "unheard-of", SUSPENDED)


@pytest.mark.postgres_only
async def test_the_terminal_lists_suspends_and_resumes(bench: Any, terminal: Any, tmp_path: Any) -> None:
    register, capabilities = tmp_path / "agents.json", tmp_path / "capabilities.json"
    agents = [json.loads(each.model_dump_json()) for each in AGENTS]
    register.write_text(json.dumps({"agents": agents}), encoding="utf-8")
    known = [json.loads(each.model_dump_json()) for each in bench.control_plane.registry.versions]
    capabilities.write_text(json.dumps({"capabilities": known}), encoding="utf-8")
    terminal.environment |= {"PLM_AGENT_REGISTER": str(register), "PLM_CAPABILITIES": str(capabilities)}
    suspended = await terminal.json("agents", "suspend", "test", "--reason", "it loops")
    assert (suspended["status"], suspended["registered_status"]) == ("suspended", "active")
    assert "test 1  suspended (it loops)" in (await terminal.run("agents", "list")).stdout
    assert (await terminal.json("agents", "resume", "test"))["halt_id"] is None
    listed = await terminal.json("capabilities", "list")
    assert [each["id"] for each in listed["items"]] == ["thing.read", "thing.write", "thing.fire"]
    refused = await terminal.json("agents", "suspend", "none", "--reason", "x", status=1)
    assert refused["reason"] == "not_found"
    await terminal.run("agents", "list", "--register", "nowhere.yaml", status=3)
