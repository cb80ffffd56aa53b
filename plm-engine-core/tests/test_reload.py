"""Capabilities are registered anew while a control plane decides: all at once, or not at all."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
import yaml
from plm_engine_core.cli import build_app
from plm_engine_core.control_plane import (
    ControlPlane,
    Denied,
    Granted,
    Outcome,
    Principal,
    Proposal,
    RunRequest,
    SyncControlPlane,
)
from plm_engine_core.control_plane.activation import ACTIVATE_SCOPE
from plm_engine_core.control_plane.errors import InvalidRequest, NotFound
from plm_engine_core.control_plane.policy.replay import Replay
from plm_engine_core.control_plane.policy.starter import policy_of
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, changes
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.vocabulary import HaltScope, OutcomeStatus, Reason, RunKind
from typer.testing import CliRunner

pytestmark = pytest.mark.every_storage

PLAIN = {"id": "thing.read", "description": "Look", "mode": "read", "plugin": "things"}
MORE = {"id": "thing.look", "description": "Look closer", "mode": "read", "plugin": "things"}


def capability(**members):
    return CapabilityDescriptor.model_validate({**PLAIN, **members})


def registry(*members):
    return CapabilityRegistry(capability(**each) for each in members)


def written(folder, *members):
    path = folder / "capabilities.yaml"
    path.write_text(yaml.safe_dump({"capabilities": [{**PLAIN, **each} for each in members]}))
    return path


def operator():
    return Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({ACTIVATE_SCOPE}))


class TestChanges:
    def test_they_are_told_by_version_and_member(self):
        tenant = uuid.UUID(int=7)
        before = registry(
            {"required_scopes": ["b", "a"], "cost": {"max_eur": "0.10"}},
            {"version": "0", "status": "deprecated"},
            MORE,
        )
        after = registry(
            {"version": "0", "status": "retired"},
            {
                "required_scopes": ["a"],
                "cost": {"max_eur": "0.2", "max_usage": {"token": 5}},
                "allowed_tenants": [tenant],
            },
            {**MORE, "version": "2"},
        )
        members = [
            "required_scopes ['a', 'b'] -> ['a']",
            "cost.max_eur '0.1' -> '0.2'",
            "cost.max_usage {} -> {'token': '5'}",
            f"allowed_tenants None -> ['{tenant}']",
        ]
        made = changes(before, after)
        assert made.lines == (
            "added thing.look 2 (active)",
            "removed thing.look 1 (was active)",
            "changed thing.read 0: status 'deprecated' -> 'retired'",
            f"changed thing.read 1: {', '.join(members)}",
        )
        assert json.loads(json.dumps(made.to_json()))["changed"][0] == {
            "id": "thing.read",
            "version": "0",
            "members": {"status": {"before": "deprecated", "after": "retired"}},
        }

    def test_the_same_in_another_order_is_no_change(self):
        one, other = {"required_scopes": ["b", "a"]}, MORE
        assert str(changes(registry(one, other), registry(other, one))) == "nothing changed"


async def test_what_is_decided_from_then_on_is_decided_by_the_new_ones(bench, tmp_path):
    plane, lease = bench.control_plane, await bench.lease()
    made = await plane.reload(written(tmp_path, {"status": "retired"}, MORE))
    assert [each.id for each in made.added] == ["thing.look"]
    assert {each.id for each in made.removed} == {"thing.write", "thing.fire"}
    refused = await plane.admit(bench.proposal(lease))
    assert (refused.reason, refused.message) == (
        Reason.CAPABILITY_INACTIVE,
        "version 1 of capability thing.read is retired",
    )
    gone = await plane.admit(bench.proposal(lease, step_index=1, capability="thing.fire"))
    assert gone.reason is Reason.CAPABILITY_UNKNOWN
    assert isinstance(await plane.admit(bench.proposal(lease, step_index=2, capability="thing.look")), Granted)
    halt = await bench.halt(HaltScope.CAPABILITY, subject="thing.look")
    assert halt.subject == "thing.look"
    with pytest.raises(NotFound):
        await bench.halt(HaltScope.CAPABILITY, subject="thing.fire")


async def test_what_was_worked_out_for_the_earlier_definition_is_not_used(bench):
    """A policy keeps what it worked out of a capability; of one that became dearer it is worked out anew."""
    bench = bench.with_policy(max_eur_per_call="0.30")
    plane, lease = bench.control_plane, await bench.lease()
    for number, (price, reason) in enumerate(
        [("0.10", None), ("0.50", Reason.BUDGET_EXCEEDED), ("0.20", None), ("0.50", Reason.BUDGET_EXCEEDED)]
    ):
        await plane.reload(registry({"cost": {"max_eur": price}}))
        answer = await plane.admit(bench.proposal(lease, step_index=number))
        assert getattr(answer, "reason", None) is reason
    steps = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert [step.decision["facts"]["capability"]["cost"]["max_eur"] for step in steps] == [
        "0.1",
        "0.5",
        "0.2",
        "0.5",
    ]


async def test_records_are_decided_again_on_the_definitions_that_they_have(bench):
    lease = await bench.lease()
    await bench.grant(lease)
    await bench.control_plane.reload(registry({"status": "retired"}))
    await bench.control_plane.admit(bench.proposal(lease, step_index=1))
    replay = Replay(policy=bench.control_plane.policy)
    async for batch in bench.storage.runs.attempts(bench.tenant, since=lease.run.created_at):
        replay.feed(batch)
    assert (replay.attempts, replay.changed) == (2, 0)


LINE = "- {id: a.b, description: x, mode: read, plugin: p}\n"
BAD = {
    "no file": (None, ("capabilities.yaml", "cannot be read")),
    "no YAML": ("capabilities: [", ("capabilities.yaml", "line 1")),
    "a member that is none": (
        "capabilities:\n- id: a.b\n  description: x\n  mode: read\n  plugin: p\n  colour: red\n",
        ("capabilities.yaml:6:3", "colour"),
    ),
    "a version twice": (
        f"capabilities:\n{LINE}{LINE}",
        ("capabilities.yaml:3:3", "version 1 of capability a.b is registered twice"),
    ),
    "two that are active": (
        f"capabilities:\n{LINE}" + LINE.replace("}", ", version: '2'}"),
        ("capabilities.yaml:3:3", "versions 1 and 2 of capability a.b are both active"),
    ),
    "what the policy names is gone": (
        "capabilities:\n- {id: thing.fire, description: x, mode: read, plugin: p}\n",
        ("the active policy", "tiers.thing.read", "thing.read is not registered"),
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_file_that_cannot_be_leaves_all_that_was(bench, tmp_path, case):
    text, words = BAD[case]
    bench = bench.with_policy(tiers={"thing.read": "auto_approve"})
    plane, lease = bench.control_plane, await bench.lease()
    before, path = plane.registry, tmp_path / "capabilities.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        await plane.reload(path)
    for word in words:
        assert word in str(refused.value)
    assert plane.registry is before
    assert isinstance(await plane.admit(bench.proposal(lease)), Granted)
    path.write_text("capabilities:\n- {id: thing.read, description: x, mode: read, plugin: things}\n")
    await plane.reload(path)
    assert isinstance(await plane.admit(bench.proposal(lease, step_index=1)), Granted)


async def test_a_policy_that_is_activated_meanwhile_is_asked_too(bench, make_policy):
    """It names what would be gone, and came after the policy of before had been asked."""
    plane = bench.control_plane
    before = plane.registry

    async def activate(_):
        policy = make_policy(version="2", tiers={"thing.write": "blocked"})
        await plane.activate_policy(bench.tenant, policy, previous=None, reason="meanwhile", by=operator())
        await plane.keeper.refresh()

    with pytest.raises(InvalidRequest, match=r"version 2: tiers\.thing\.write"):
        await plane.reload(registry({}), record=activate)
    assert plane.registry is before


async def test_the_newest_activation_is_asked_though_nobody_told_of_it(bench, make_policy):
    plane = bench.control_plane
    policy = make_policy(version="2", tiers={"thing.write": "blocked"})
    await plane.activate_policy(bench.tenant, policy, previous=None, reason="just now", by=operator())
    with pytest.raises(InvalidRequest, match=r"tiers\.thing\.write"):
        await plane.reload(registry({}))


async def test_what_could_not_be_recorded_is_not_exchanged(bench):
    plane = bench.control_plane
    before, told = plane.registry, []

    async def refuse(made):
        told.append(made)
        raise ConnectionError("nobody writes this down")

    with pytest.raises(ConnectionError):
        await plane.reload(registry(MORE), record=refuse)
    assert [str(made) for made in told] == [str(changes(before, registry(MORE)))]
    assert plane.registry is before


async def test_while_nothing_decides_capabilities_are_registered_all_the_same(bench):
    plane, lease = bench.control_plane, await bench.lease()
    plane.in_force.withdraw("a test")
    await plane.reload(registry(MORE))
    assert [each.id for each in plane.registry] == ["thing.look"]
    denied = await plane.admit(bench.proposal(lease, capability="thing.look"))
    assert isinstance(denied, Denied)
    plane.in_force.install(bench.control_plane.keeper._file)
    assert isinstance(await plane.admit(bench.proposal(lease, capability="thing.look")), Granted)


async def test_an_activation_is_held_to_what_is_registered_by_then(bench, make_policy):
    plane = bench.control_plane
    policy = make_policy(tiers={"thing.look": "blocked"})
    keywords = {"previous": None, "reason": "a test", "by": operator()}
    with pytest.raises(InvalidRequest, match=r"thing\.look is not registered"):
        await plane.activate_policy(bench.tenant, policy, **keywords)
    await plane.reload(registry({}, MORE))
    assert (await plane.activate_policy(bench.tenant, policy, **keywords)).digest == policy.digest


async def test_of_two_reloads_the_one_that_was_asked_for_last_stands(bench, tmp_path):
    """The second has to wait for the first, which would otherwise come after it."""
    plane, second = bench.control_plane, []

    async def meanwhile(_):
        second.append(asyncio.create_task(plane.reload(written(tmp_path, {"version": "3"}))))
        await asyncio.wait(second, timeout=0.3)

    made = await plane.reload(registry({"version": "2"}), record=meanwhile)
    assert [each.version for each in made.added] == ["2"]
    made = await second[0]
    assert ([each.version for each in made.added], [each.version for each in made.removed]) == (["3"], ["2"])
    assert plane.registry.get("thing.read").version == "3"


def of_version(number):
    """Version n costs n times as much in every way, so that a decision made of two would show."""
    return registry({
        "version": str(number),
        "cost": {"max_eur": f"0.0{number}", "eur_per_unit": {"thing": f"0.00{number}"}},
        "timeout_seconds": float(number),
    })  # fmt: skip


def whole(step):
    """Which version an attempt was decided and settled by; fails where they are two."""
    described = step.decision["facts"]["capability"]
    number = int(described["version"])
    assert Decimal(described["cost"]["max_eur"]) == Decimal(number) / 100
    assert described["timeout_seconds"] == number
    assert Decimal(step.decision["reserve"]["EUR"]) == Decimal(number) / 100
    return number


USED = Outcome(status=OutcomeStatus.SUCCEEDED, usage={"thing": Decimal(1)})


async def test_no_call_is_decided_or_settled_by_parts_of_two_definitions(bench):
    plane, versions = bench.control_plane, itertools.cycle(range(2, 10))
    await plane.reload(of_version(2))
    done, exchanged = asyncio.Event(), asyncio.Event()

    async def exchange():
        while not done.is_set():
            await plane.reload(of_version(next(versions)))
            exchanged.set()  # for those who wait now
            exchanged.clear()

    async def one_run():
        lease = await bench.lease(await bench.run(budget={"EUR": Decimal(5)}))
        spent = []
        for number in range(12):
            if number % 4 == 3:  # or a fast storage is through before anything was exchanged
                await exchanged.wait()
            grant = await plane.admit(bench.proposal(lease, step_index=number), begin=True)
            assert isinstance(grant, Granted), grant
            settled = await plane.settle(
                grant.grant,
                USED,
                capability=grant.capability,
                fencing_token=lease.fencing_token,
                trace_id=lease.run.trace_id,
                actor="test",
            )
            spent.append(Decimal(settled.spent["EUR"]) * 1000)
        steps = await bench.storage.runs.steps(bench.tenant, lease.run.id)
        assert [whole(step) for step in steps] == spent
        return spent

    exchanging = asyncio.create_task(exchange())
    try:
        met = await asyncio.gather(*(one_run() for _ in range(8)))
    finally:
        done.set()
        await exchanging
    assert all(len(set(each)) > 1 for each in met), "nothing was exchanged in between"


def test_from_many_threads_nothing_is_lost_and_nothing_mixed():
    storage = MemoryStorage()
    tenant = storage.add_tenant(uuid.uuid4())
    policy = policy_of({"rate_limit": {"per_second": 100000, "burst": 100000}})
    agent = Principal(user_id=uuid.uuid4(), actor_kind="agent", scopes=frozenset({"plm.runs.create"}))
    done = threading.Event()
    with SyncControlPlane(ControlPlane(policy=policy, registry=of_version(2), storage=storage)) as plane:
        bench_of = {"tenant_id": tenant, "agent": {"name": "t"}, "input": {}, "kind": RunKind.EXTERNAL}

        def exchange():
            for number in itertools.cycle(range(2, 10)):
                if done.is_set():
                    return
                plane.reload(of_version(number))
                with pytest.raises(InvalidRequest):
                    plane.reload("/does/not/exist.yaml")

        def one_run(_):
            run, _ = plane.create_run(
                RunRequest(run_id=uuid.uuid4(), trace_id=uuid.uuid4().hex, **bench_of), principal=agent
            )
            lease = plane.call(
                lambda core: core.storage.runs.take(tenant, run.id, owner="t", seconds=60, kind=RunKind.EXTERNAL)
            )
            for number in range(10):
                granted = plane.admit(
                    Proposal(
                        tenant_id=tenant,
                        run_id=run.id,
                        fencing_token=lease.fencing_token,
                        step_index=number,
                        attempt=1,
                        step_id="s",
                        capability="thing.read",
                        resource="r",
                        arguments={},
                        principal=agent,
                    ),
                    begin=True,
                )
                plane.settle(
                    granted.grant,
                    USED,
                    fencing_token=lease.fencing_token,
                    trace_id=run.trace_id,
                    actor="t",
                )
            return [whole(step) for step in plane.call(lambda core: core.storage.runs.steps(tenant, run.id))]

        with ThreadPoolExecutor(9) as pool:
            exchanging = pool.submit(exchange)
            try:
                met = list(pool.map(one_run, range(8)))
            finally:
                done.set()
            exchanging.result()
        assert [len(each) for each in met] == [10] * 8


class TestCheck:
    """`plm-cli capabilities check` tries a file before a node reads it."""

    @pytest.fixture
    def check(self, tmp_path, monkeypatch):
        def run(new, *options, **environment):
            (tmp_path / "new").mkdir(exist_ok=True)
            file = written(tmp_path / "new", *new)
            for name in ("PLM_CAPABILITIES", "PLM_POLICY"):
                monkeypatch.delenv(name, raising=False)
            arguments = ["capabilities", "check", str(file), *options]
            return CliRunner().invoke(build_app(), arguments, env=environment)

        return run

    def test_it_says_what_would_change(self, check, tmp_path):
        old = str(written(tmp_path, {}, MORE))
        done = check([{"status": "deprecated"}], PLM_CAPABILITIES=old)
        assert (done.exit_code, done.stdout.splitlines()) == (
            0,
            ["removed thing.look 1 (was active)", "changed thing.read 1: status 'active' -> 'deprecated'"],
        )
        assert check([{}, MORE], PLM_CAPABILITIES=old).stdout == "nothing changed\n"
        assert check([{}]).stdout == "it can be used\n"
        answer = json.loads(check([MORE], "--json", PLM_CAPABILITIES=old).stdout)
        assert [each["id"] for each in answer["changes"]["removed"]] == ["thing.read"]

    def test_it_says_what_is_wrong(self, check, tmp_path):
        done = check([{}, {}])
        assert done.exit_code == 1
        assert "capabilities.yaml:" in done.stderr
        assert "registered twice" in done.stderr
        policy = tmp_path / "policy.json"
        policy.write_text(policy_of({"tiers": {"thing.look": "blocked"}}).model_dump_json())
        done = check([{}], "--json", PLM_POLICY=str(policy))
        assert done.exit_code == 1
        assert "tiers.thing.look" in json.loads(done.stdout)["message"]
        assert check([MORE], PLM_POLICY=str(policy)).exit_code == 0
