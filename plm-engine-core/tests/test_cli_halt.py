"""`plm-cli halt`: an operator stops and lifts as a person, with the reasons and codes of the API."""

from __future__ import annotations

import pytest
from plm_engine_core.control_plane.vocabulary import HaltScope


@pytest.fixture
def terminal(terminal, registry, tmp_path):
    """With a capability file, as an operator has it."""
    path = tmp_path / "capabilities.json"
    capabilities = ", ".join(each.model_dump_json() for each in registry)
    path.write_text(f'{{"capabilities": [{capabilities}]}}', encoding="utf-8")
    terminal.environment["PLM_CAPABILITIES"] = str(path)
    return terminal


@pytest.mark.parametrize("scope", [HaltScope.TENANT, HaltScope.AGENT, HaltScope.RUN, HaltScope.CAPABILITY])
async def test_a_halt_is_triggered_listed_and_lifted(terminal, bench, scope):
    run = await bench.run()
    names = {
        HaltScope.TENANT: (),
        HaltScope.AGENT: ("--agent", "test"),
        HaltScope.RUN: ("--run", run.id),
        HaltScope.CAPABILITY: ("--capability", "thing.read"),
    }
    halt = await terminal.json("halt", "trigger", scope.value, *names[scope], "--reason", "smoke")
    assert (halt["scope"], halt["cancel_seconds"]) == (scope.value, 30.0)
    again = await terminal.json("halt", "trigger", scope.value, *names[scope], "--reason", "fire")
    assert again == halt
    assert [each["id"] for each in (await terminal.json("halt", "list"))["items"]] == [halt["id"]]
    assert "smoke (no calls met)" in (await terminal.run("halt", "list")).stdout
    assert "is lifted" in (await terminal.run("halt", "lift", halt["id"])).stdout
    assert "no halt stands" in (await terminal.run("halt", "list")).stdout
    assert len((await terminal.json("halt", "list", "--all"))["items"]) == 1


async def test_a_drill_tells_what_a_halt_would_stop(terminal, bench):
    lease = await bench.lease()
    await bench.begun(lease)
    told = await terminal.json("halt", "drill", "agent", "--agent", "test")
    assert (told["scope"], told["subject"], told["runs"], told["grants"], told["calls"]) == (
        "agent",
        "test",
        {"running": 1},
        0,
        1,
    )
    said = (await terminal.run("halt", "drill", "tenant")).stdout
    assert said == "tenant: runs 1 running; 0 unused grants to revoke, 1 calls in flight to cancel\n"
    await terminal.run("halt", "drill", "run", status=2)
    assert "[not_found]" in (await terminal.run("halt", "drill", "agent", "--agent", "tset", status=1)).stderr
    assert "no halt stands" in (await terminal.run("halt", "list")).stdout


async def test_what_is_not_there_or_not_allowed_is_refused_with_its_reason(terminal, bench):
    await bench.run()
    tenant = ("halt", "trigger", "tenant", "--reason", "x")
    weak = terminal.token(scopes=("plm.hitl.resolve",))
    refused = await terminal.json(*tenant, status=1, token=weak)
    assert (refused["reason"], refused["missing_scopes"]) == ("missing_scopes", ["plm.halt"])
    for scope, name in (("agent", "tset"), ("capability", "thing.raed")):
        said = await terminal.run("halt", "trigger", scope, f"--{scope}", name, "--reason", "x", status=1)
        assert said.stderr.rstrip().endswith("[not_found]")
    await terminal.run("halt", "trigger", "run", "--reason", "x", status=2)
    await terminal.run(*tenant, "--agent", "test", status=2)
    await terminal.run(*tenant, "--cancel-seconds", "inf", status=2)
    said = await terminal.run("halt", "trigger", "tenant", "--reason", " ", status=1)
    assert "[invalid_request]" in said.stderr
    assert await bench.storage.halts.list(bench.tenant, limit=9, before=None, standing=False) == []


async def test_a_registered_agent_is_halted_before_it_ever_ran(terminal, bench, tmp_path):
    trigger = ("halt", "trigger", "agent", "--agent", "new", "--reason", "x")
    await terminal.run(*trigger, status=1)
    register = tmp_path / "agents.yaml"
    register.write_text("agents: [{id: new, owner: somebody}]", encoding="utf-8")
    halt = await terminal.json(*trigger, "--register", register)
    assert (halt["scope"], halt["subject"]) == ("agent", "new")
    said = await terminal.run(*trigger, "--register", tmp_path / "nothing.yaml", status=3)
    assert "nothing.yaml" in said.stderr
