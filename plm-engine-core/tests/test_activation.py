"""Putting a policy in force: an act with an author and a record, that every process follows and no race doubles."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from plm_engine_core.cli import build_app
from plm_engine_core.control_plane import Denied, Granted, Pending, Principal
from plm_engine_core.control_plane.activation import ACTIVATE_SCOPE, MAX_REASON, Activation
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry
from plm_engine_core.control_plane.errors import Conflict, Forbidden, InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.events import TENANT_STREAM
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider
from plm_engine_core.control_plane.in_force import PolicyInForce, PolicyKeeper
from plm_engine_core.control_plane.policy import PolicySnapshot, load_policy, read_policy
from plm_engine_core.control_plane.policy.plan import Plans
from plm_engine_core.control_plane.policy.replay import Attempt
from plm_engine_core.control_plane.policy.shadow import ShadowReport
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.vocabulary import PolicyRole, Reason, TicketDecision
from typer.testing import CliRunner

pytestmark = pytest.mark.every_storage

BLOCKED = {"thing.read": "blocked"}
DEV = Path(__file__).parents[2] / "dev"


@pytest.fixture
def operator() -> Principal:
    return Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({ACTIVATE_SCOPE}))


@pytest.fixture
def activate(bench: Any, operator: Principal) -> Any:
    """Activates in the bench's tenant."""

    async def activate(policy: PolicySnapshot | None, **changes: Any) -> Activation:
        given = {"previous": None, "reason": "a test", "by": operator, **changes}
        return await bench.control_plane.activate_policy(bench.tenant, policy, **given)

    return activate


def keeper_of(bench: Any, file: PolicySnapshot) -> PolicyKeeper:
    plane = bench.control_plane
    return PolicyKeeper(plane.in_force, plane.storage.policies, file=file, every_seconds=60)


async def test_an_activated_policy_decides_everywhere_and_the_file_no_longer(
    bench: Any, make_policy: Any, activate: Any
) -> None:
    keeper = keeper_of(bench, bench.control_plane.policy)
    lease = await bench.lease()
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)
    made = await activate(make_policy(tiers=BLOCKED))
    await keeper.refresh()
    assert bench.control_plane.policy.digest == made.digest
    denied = await bench.control_plane.admit(bench.proposal(lease, step_index=1, step_id="second"))
    assert (denied.reason, isinstance(denied, Denied)) == (Reason.CAPABILITY_BLOCKED, True)
    other = bench.with_policy()  # another process, started with the file
    await keeper_of(other, other.control_plane.policy).refresh()
    assert other.control_plane.policy.digest == made.digest


async def test_news_make_the_keeper_look_at_once(bench: Any, make_policy: Any, activate: Any) -> None:
    news = asyncio.Event()
    plane = bench.control_plane
    keeper = PolicyKeeper(plane.in_force, plane.storage.policies, file=plane.policy, news=news, every_seconds=3600)
    running = asyncio.create_task(keeper.run())
    try:
        made = await activate(make_policy(version="newer"))
        news.set()
        for _ in range(6000):
            await asyncio.sleep(0.01)
            if plane.policy.digest == made.digest:
                break
        assert plane.policy.digest == made.digest
    finally:
        running.cancel()


async def test_the_record_says_who_when_why_and_what_was_before(
    bench: Any, make_policy: Any, activate: Any, operator: Principal
) -> None:
    first = await activate(make_policy(version="one"), reason="to begin")
    second = await activate(make_policy(version="two"), previous=first.digest, reason="to go on")
    assert (second.number, second.previous, second.version) == (2, first.digest, "two")
    assert (second.activated_by, second.reason) == (operator.user_id, "to go on")
    assert await bench.storage.policies.history(limit=9) == [second, first]
    events = await bench.storage.events.read(bench.tenant, TENANT_STREAM)
    assert [(event.kind, event.actor) for event in events] == [("policy_activated", operator.actor)] * 2
    assert events[1].data == {
        "number": 2, "digest": second.digest, "version": "two", "previous": first.digest, "reason": "to go on",
    }  # fmt: skip


async def test_of_many_who_act_at_once_on_the_same_belief_one_wins(bench: Any, make_policy: Any, activate: Any) -> None:
    policies = [make_policy(version=f"number {number}") for number in range(8)]
    answers = await asyncio.gather(*map(activate, policies), return_exceptions=True)
    winners = [answer for answer in answers if isinstance(answer, Activation)]
    assert len(winners) == 1
    assert {answer.reason for answer in answers if isinstance(answer, Conflict)} == {"policy_changed"}
    assert len(await bench.storage.policies.history(limit=99)) == 1
    assert (await bench.storage.policies.standing()).active == winners[0]


async def test_an_earlier_policy_can_be_put_back(bench: Any, make_policy: Any, activate: Any) -> None:
    one, two = make_policy(version="one"), make_policy(version="two")
    await activate(one)
    await activate(two, previous=one.digest)
    assert (await activate(one, previous=two.digest)).number == 3
    assert len(bench.behind.rows("policy_versions")) == 2


async def test_who_may_not_and_what_cannot_be_is_refused_and_leaves_nothing(
    bench: Any, make_policy: Any, activate: Any, operator: Principal
) -> None:
    good = make_policy()
    for by, reason in (
        (replace(operator, actor_kind="agent"), "not_human"),
        (replace(operator, actor_kind="system"), "not_human"),
        (replace(operator, scopes=bench.approver.scopes), "missing_scopes"),
    ):
        with pytest.raises(Forbidden) as forbidden:
            await activate(good, by=by)
        assert forbidden.value.reason == reason
    for policy, changes in (
        (good, {"reason": "  "}),
        (good, {"reason": "x" * (MAX_REASON + 1)}),
        (None, {}),
        (make_policy(tiers={"thing.unknown": "blocked"}), {}),
        (make_policy(evaluators=[{"name": "odd", "kind": "no-such-kind"}]), {}),
    ):
        with pytest.raises(InvalidRequest):
            await activate(policy, **changes)
    with pytest.raises(Conflict):
        await activate(good, previous="0" * 64)
    assert bench.behind.rows("policy_activations") == bench.behind.rows("policy_versions") == []


async def test_an_approval_given_under_another_policy_is_worth_nothing(
    bench: Any, make_policy: Any, activate: Any
) -> None:
    lease, pending = await bench.ask()
    await activate(make_policy(version="other"))
    await keeper_of(bench, bench.control_plane.policy).refresh()
    await bench.decide(pending, TicketDecision.APPROVE)
    lease = await bench.lease(lease.run)
    again = bench.proposal(lease, capability="thing.write", ticket_id=pending.ticket_id)
    denied = await bench.control_plane.admit(again)
    assert (type(denied), denied.reason) == (Denied, Reason.APPROVAL_MISMATCH)


@pytest.mark.postgres_only
@pytest.mark.parametrize("statement", ["UPDATE {} SET {}", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
async def test_nobody_changes_a_policy_or_an_activation(
    bench: Any, make_policy: Any, activate: Any, statement: str
) -> None:
    await activate(make_policy())
    for table, change in (("policy_versions", "version = 'x'"), ("policy_activations", "reason = 'x'")):
        with pytest.raises(psycopg.errors.CheckViolation, match="append-only"):
            bench.sql(statement.format(table, change))  # as a superuser


@pytest.mark.postgres_only
async def test_the_database_holds_a_content_to_its_digest(bench: Any, make_policy: Any) -> None:
    policy = make_policy()
    with pytest.raises(psycopg.errors.CheckViolation):
        bench.sql(
            "INSERT INTO policy_versions (digest, version, content) VALUES (%s, 'x', %s)",
            policy.digest, policy.content.replace("auto_approve", "unrestricted"),
        )  # fmt: skip


@pytest.mark.postgres_only
async def test_a_process_that_cannot_load_the_active_policy_decides_nothing_until_it_can(
    bench: Any, make_policy: Any, activate: Any
) -> None:
    lease = await bench.lease()
    keeper = keeper_of(bench, bench.control_plane.policy)
    text = '{"version": "of a later release", "unheard_of": true}'
    bench.sql("INSERT INTO policy_versions SELECT encode(sha256(%s), 'hex'), 'later', %s", text.encode(), text)
    bench.sql(
        "INSERT INTO policy_activations (number, role, digest, reason, activated_by) "
        "SELECT 1, 'active', digest, 'x', gen_random_uuid() FROM policy_versions"
    )
    with pytest.raises(InvalidRequest, match="correct it"):
        await keeper.refresh()
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert (type(denied), denied.reason) == (Denied, Reason.POLICY_MISSING)
    with pytest.raises(StorageUnavailable):
        await bench.run()
    with pytest.raises(InvalidRequest):  # each look tells it again
        await keeper.refresh()
    ((digest,),) = bench.sql("SELECT digest FROM policy_versions")
    await activate(make_policy(), previous=digest)
    await keeper.refresh()
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)


async def test_a_database_that_is_gone_leaves_what_decides_and_is_told(make_policy: Any) -> None:
    class Gone:
        async def standing(self) -> Any:
            raise StorageUnavailable("gone")

    in_force = PolicyInForce(make_policy(), EvaluatorRegistry(), CapabilityRegistry(()))
    with pytest.raises(StorageUnavailable):
        await PolicyKeeper(in_force, Gone(), file=make_policy()).refresh()  # type: ignore[arg-type]
    assert in_force.now.policy == make_policy()


@pytest.mark.parametrize("path", sorted(DEV.glob("policy*.yaml")), ids=lambda path: path.name)
def test_a_policy_is_read_back_from_its_content_as_it_was(path: Path) -> None:
    policy = load_policy(path)
    again = read_policy(policy.content, source="its content")
    assert (again, again.digest) == (policy, policy.digest)


async def test_the_shadow_decides_beside_and_changes_nothing(bench: Any, make_policy: Any, activate: Any) -> None:
    lease = await bench.lease()
    keeper = keeper_of(bench, bench.control_plane.policy)
    draft = make_policy(tiers={"thing.write": "blocked", "thing.fire": "always_approve"})
    await activate(draft, role=PolicyRole.SHADOW)
    await keeper.refresh()
    assert bench.control_plane.policy.digest != draft.digest
    plane = bench.control_plane
    assert isinstance(await plane.admit(bench.proposal(lease)), Granted)
    fire = bench.proposal(lease, step_index=1, step_id="b", capability="thing.fire")
    assert isinstance(await plane.admit(fire), Granted)
    write = bench.proposal(lease, step_index=2, step_id="c", capability="thing.write")
    assert isinstance(await plane.admit(write), Pending)
    records = [step.decision["shadow"] for step in await bench.storage.runs.steps(bench.tenant, lease.run.id)]
    assert [record["outcome"] for record in records] == ["allow", "ask", "deny"]
    assert {record["digest"] for record in records} == {draft.digest}
    assert records[2]["reason"] == "capability_blocked"
    report = ShadowReport(digest=draft.digest)
    async for batch in bench.storage.runs.attempts(bench.tenant, since=lease.run.created_at):
        report.feed(batch)
    assert (report.compared, report.changed) == (3, 2)
    assert report.outcomes == {("allow", "allow"): 1, ("allow", "ask"): 1, ("ask", "deny"): 1}
    await activate(None, role=PolicyRole.SHADOW, previous=draft.digest, reason="seen enough")
    await keeper.refresh()
    last = await bench.lease()
    await plane.admit(bench.proposal(last))
    (step,) = await bench.storage.runs.steps(bench.tenant, last.run.id)
    assert "shadow" not in step.decision


def test_a_record_that_is_no_decision_is_counted_and_keeps_no_other_from_being_compared() -> None:
    seen = {"outcome": "allow", "shadow": {"digest": "d", "outcome": "deny"}}
    damaged = [[], 1, None, "allow", {"shadow": 1}, {"shadow": {}}, {"shadow": {"digest": "d"}}]
    report = ShadowReport(digest="d")
    names = {"run_id": "r", "step_index": 0, "attempt": 1, "capability": "c", "resource": "x", "arguments": {}}
    report.feed(Attempt(**names, decision=each) for each in (*damaged, {}, seen))
    assert (report.compared, report.changed, report.unreadable) == (1, 1, len(damaged))
    assert report.to_json()["unreadable"] == len(damaged)


async def test_a_shadow_that_fails_is_recorded_as_such_and_nothing_else_notices(
    bench: Any, make_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = make_policy(version="draft")
    plane = bench.control_plane
    plane.in_force.install(plane.policy, shadow=draft)
    monkeypatch.setattr(PolicySnapshot, "plans", property(lambda policy: _plans(policy, draft)))
    lease = await bench.lease()
    assert isinstance(await plane.admit(bench.proposal(lease)), Granted)
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert step.decision["shadow"] == {
        "digest": draft.digest, "outcome": "error", "message": "ZeroDivisionError: the draft is broken",
    }  # fmt: skip


def _plans(policy: PolicySnapshot, broken: PolicySnapshot) -> Any:
    if policy is broken:
        raise ZeroDivisionError("the draft is broken")
    return Plans(policy)


async def test_a_shadow_asks_no_evaluator_and_says_where_it_would_have_to(bench: Any, make_policy: Any) -> None:
    gate = {
        "name": "words",
        "kind": "regex",
        "capabilities": ["thing.read"],
        "config": {"field": "arguments.name", "deny": ["secret"]},
    }
    draft = make_policy(evaluators=[gate])
    plane = bench.control_plane
    plane.in_force.install(plane.policy, shadow=draft)
    lease = await bench.lease()
    assert isinstance(await plane.admit(bench.proposal(lease)), Granted)
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert step.decision["shadow"]["outcome"] == "undecided"


SECRET = "a-secret-for-tests-of-forty-characters!!"


def _cli(bench: Any, token: str, *arguments: str) -> Any:
    environment = {
        "PG_DSN": bench.database.app,
        "PLM_IDENTITY_HS256_SECRET_ACTIVE": SECRET,
        "PLM_TOKEN": token,
        "PLM_CAPABILITIES": str(DEV / "capabilities.yaml"),
        "ENVIRONMENT": None,
        "IDENTITY_PROVIDER_MODE": None,
        "PLM_OIDC_ISSUER": None,
    }
    return CliRunner().invoke(build_app(), ["policy", *arguments], env=environment)


@pytest.mark.postgres_only
def test_the_terminal_activates_tries_and_tells(bench: Any, tmp_path: Path) -> None:
    def token(*scopes: str) -> str:
        now = int(time.time())
        claims = {"sub": str(uuid.UUID(int=7)), "tenant_id": str(bench.tenant), "actor_kind": "human"}
        provider = Hs256JwtIdentityProvider(active_secret=SECRET)
        return provider.issue_token({**claims, "scopes": list(scopes), "iat": now, "exp": now + 3600})

    operator = token(ACTIVATE_SCOPE)
    file, draft = DEV / "policy.yaml", tmp_path / "draft.yaml"
    draft.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text(encoding="utf-8")), "version": "draft"}))
    assert "none was activated" in _cli(bench, "", "active").stdout
    assert _cli(bench, operator, "activate", str(file), "--reason", "x").exit_code == 2
    first = _cli(bench, operator, "activate", str(file), "--reason", "to begin", "--first", "--json")
    assert first.exit_code == 0, first.output
    digest = json.loads(first.stdout)["digest"]
    assert digest == load_policy(file).digest
    again = _cli(bench, operator, "activate", str(draft), "--reason", "x", "--first")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "not unset any more" in again.stderr
    refused = _cli(bench, token("plm.halt"), "activate", str(draft), "--reason", "x", "--previous", digest)
    assert (refused.exit_code, ACTIVATE_SCOPE in refused.stderr) == (1, True)
    assert _cli(bench, "junk", "activate", str(draft), "--reason", "x", "--previous", digest).exit_code == 3
    assert _cli(bench, operator, "shadow", "start", str(draft), "--reason", "a trial").exit_code == 0
    standing = json.loads(_cli(bench, "", "active", "--json").stdout)
    assert (standing["active"]["digest"], standing["shadow"]["version"]) == (digest, "draft")
    report = json.loads(_cli(bench, "", "shadow", "report", "--tenant-id", str(bench.tenant), "--json").stdout)
    assert (report["compared"], report["shadow_digest"]) == (0, standing["shadow"]["digest"])
    assert _cli(bench, operator, "shadow", "stop", "--reason", "done").exit_code == 0
    assert _cli(bench, "", "shadow", "report", "--tenant-id", str(bench.tenant)).exit_code == 1
    audited = bench.sql("SELECT count(*) FROM audit_log WHERE user_id = %s", uuid.UUID(int=7))
    assert audited == [(5,)]  # everyone whose token was good, also where the act was refused
