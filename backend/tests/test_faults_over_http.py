"""The table of faults in docs/reasons.md over HTTP: the same denials as through the faces and the terminal.

A database server that is really stopped under a running one is in `refusals` and `test_lost_database.py`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from plm_backend.app import create_app
from plm_backend.settings import Settings
from plm_backend.wiring import Platform, open_platform
from plm_engine_core.control_plane import Denied, InputRequest, Pending, Principal, Proposal, RunRequest
from plm_engine_core.control_plane.admission.evaluators import BUILT_IN, EvaluatorRegistry
from plm_engine_core.control_plane.errors import PolicyMissing
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.in_force import PolicyInForce
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.vocabulary import EvaluationPhase
from plm_engine_core.testing.fault_table import GOES_ON, Fault, due, read_fault_table
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import create_tenants
from pydantic import BaseModel

TABLE = read_fault_table((Path(__file__).parents[2] / "docs" / "reasons.md").read_text(encoding="utf-8"))
REQUESTS = ("verify", "create a run", "decide a ticket", "give an input", "lift", "halt")
SCOPES = ("plm.runs.create", "plm.halt", "plm.hitl.resolve", "probe.write")
EXPIRIES = (("run_states", "lease_expires_at"), ("approval_tickets", "deadline"))
UNREADABLE = json.dumps({"of": "a later release"})


@dataclass(kw_only=True)
class Scene:
    """An API in this process, and something to decide, to halt and to lift, made while all was well."""

    platform: Platform
    client: httpx.AsyncClient
    database: DatabaseUrls
    tenant: uuid.UUID
    run: uuid.UUID
    ticket: uuid.UUID
    asked: uuid.UUID
    halt: str
    until: Callable[[Callable[[], Any], str], Any]

    async def ask(self, operation: str) -> str:
        """What a request is answered: its reason, or the last word of its code."""
        method, address, body = {
            "verify": ("GET", "/v1/events/verification", None),
            "create a run": ("POST", "/v1/runs", {"agent": "echo"}),
            "decide a ticket": ("POST", f"/v1/approvals/{self.ticket}/decision", {"decision": "approve"}),
            "give an input": (
                "POST",
                f"/v1/approvals/{self.asked}/decision",
                {"decision": "provide_input", "input": 3},
            ),
            "lift": ("DELETE", f"/v1/halts/{self.halt}", None),
            "halt": ("POST", "/v1/halts", {"scope": "tenant", "reason": "stop"}),
        }[operation]
        answer = await self.client.request(method, address, json=body)
        if answer.is_success:
            return GOES_ON
        problem = answer.json()
        return str(problem.get("reason", problem["code"].rpartition("/")[2]))

    def sql(self, *statements: str) -> None:
        with psycopg.connect(self.database.admin, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())


@pytest.fixture
async def scene(
    new_database: Callable[[], DatabaseUrls],
    settings_of: Callable[..., dict[str, str]],
    tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
    until: Callable[[Callable[[], Any], str], Any],
) -> AsyncIterator[Scene]:
    database = new_database()
    (tenant,) = create_tenants(database, "faulty")
    for name, value in settings_of(database).items():
        monkeypatch.setenv(name, value)
    async with open_platform(Settings(), database.app) as platform, client_of(platform, tokens.issue(tenant)) as client:
        requester = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset(SCOPES))
        run, pending = await ask(platform, tenant, requester, "probe.write")
        asked = await question(platform, tenant, requester)
        assert isinstance(pending, Pending)
        assert isinstance(asked, Pending)
        other = (await client.post("/v1/runs", json={"agent": "echo"})).json()["run_id"]
        stopped = await client.post("/v1/halts", json={"scope": "run", "scope_id": other, "reason": "look"})
        client.headers["Authorization"] = f"Bearer {tokens.issue(tenant, scopes=SCOPES)}"
        yield Scene(
            platform=platform,
            client=client,
            database=database,
            tenant=tenant,
            run=run,
            ticket=pending.ticket_id,
            asked=asked.ticket_id,
            halt=stopped.json()["halt_id"],
            until=until,
        )


def client_of(platform: Platform, token: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(platform), raise_app_exceptions=False)
    return httpx.AsyncClient(
        transport=transport, base_url="http://plm", headers={"Authorization": f"Bearer {token}"}, timeout=60
    )


async def taken(platform: Platform, tenant: uuid.UUID, by: Principal) -> dict[str, Any]:
    """The first step of a new run that a run worker has taken, as far as proposals and questions have it alike."""
    plane = platform.control_plane
    request = RunRequest(
        tenant_id=tenant, run_id=new_id(), agent={"name": "probe"}, input={}, trace_id=secrets.token_hex(16)
    )
    run, _ = await plane.create_run(request, principal=by)
    lease = await plane.storage.runs.take(tenant, run.id, owner="test", seconds=60)
    assert lease is not None
    return {
        "tenant_id": tenant,
        "run_id": run.id,
        "fencing_token": lease.fencing_token,
        "step_index": 0,
        "attempt": 1,
        "step_id": "first",
        "principal": by,
    }


async def ask(platform: Platform, tenant: uuid.UUID, by: Principal, capability: str) -> tuple[uuid.UUID, Any]:
    """Such a run, and what its first proposal was answered."""
    first = await taken(platform, tenant, by)
    proposal = Proposal(**first, capability=capability, resource="probe", arguments={})
    return first["run_id"], await platform.control_plane.admit(proposal)


async def question(platform: Platform, tenant: uuid.UUID, by: Principal) -> Any:
    """What a question of such a run to humans was answered."""
    first = await taken(platform, tenant, by)
    return await platform.control_plane.ask(InputRequest(**first, question="How many?"))


@asynccontextmanager
async def suffering(scene: Scene, fault: Fault) -> AsyncIterator[None]:
    match fault:
        case Fault.STORAGE_GONE:
            await scene.platform.pool.close()
        case Fault.NO_POLICY:
            scene.sql(
                f"INSERT INTO policy_versions SELECT encode(sha256('{UNREADABLE}'), 'hex'), 'x', '{UNREADABLE}'",
                "INSERT INTO policy_activations (number, role, digest, reason, activated_by) "
                "SELECT 1, 'active', digest, 'x', gen_random_uuid() FROM policy_versions",
            )
            await asyncio.to_thread(scene.until, lambda: without_policy(scene.platform), "the policy is withdrawn")
        case Fault.CLOCK_AHEAD | Fault.CLOCK_BACK:
            sign = "-" if fault is Fault.CLOCK_AHEAD else "+"
            changes = [f"UPDATE {table} SET {name} = {name} {sign} interval '2 hours'" for table, name in EXPIRIES]  # noqa: S608  # ours
            scene.sql(*changes)
        case _:
            with locked(scene.database):
                yield
            return
    yield


@contextmanager
def locked(database: DatabaseUrls) -> Any:
    with psycopg.connect(database.admin) as holder:
        holder.execute("LOCK TABLE events, run_states, rate_buckets IN ACCESS EXCLUSIVE MODE")
        yield


def without_policy(platform: Platform) -> bool:
    try:
        return platform.control_plane.policy is None
    except PolicyMissing:
        return True


class Configuration(BaseModel):
    """Nothing to configure."""


def evaluator(behaviour: Callable[[], Any]) -> type[Any]:
    class Odd:
        kind = "odd"
        config_schema = Configuration

        def __init__(self, config: Configuration) -> None:
            self.config = config

        async def evaluate(self, proposal: Any, facts: Any) -> Any:
            return await self.examine(None)

        async def examine(self, examined: Any) -> Any:
            answer = behaviour()
            return await answer if asyncio.iscoroutine(answer) else answer

    return Odd


def broken() -> Any:
    raise RuntimeError("a defect")


ODD: dict[str, Callable[[], Any]] = {
    "raises": broken,
    "hangs": lambda: asyncio.sleep(600),
    "answers nonsense": lambda: "yes",
}


def with_evaluators(platform: Platform, kinds: list[type[Any]], *evaluators: dict[str, Any]) -> None:
    """Have these evaluators asked by the policy that decides."""
    plane = platform.control_plane
    changed = PolicySnapshot.model_validate({**plane.policy.model_dump(mode="json"), "evaluators": evaluators})
    plane.in_force = PolicyInForce(changed, EvaluatorRegistry([*BUILT_IN, *kinds]), plane.registry)


@pytest.mark.parametrize("behaviour", ODD)
async def test_under_a_fault_of_an_evaluator_the_api_answers_as_the_table_says(scene: Scene, behaviour: str) -> None:
    gates = [{"name": f"odd-{phase}", "kind": "odd", "timeout_ms": 50, "phase": phase} for phase in EvaluationPhase]
    with_evaluators(scene.platform, [evaluator(ODD[behaviour])], *gates)
    answers_due = due(TABLE, Fault.EVALUATOR, REQUESTS)
    assert {operation: await scene.ask(operation) for operation in answers_due} == answers_due


async def test_a_run_that_an_evaluator_refuses_leaves_nothing_but_the_record_of_it(scene: Scene) -> None:
    secret = "AKIAEXAMPLE0000000000"  # nobody's
    config = {"patterns": ["AKIA[A-Z0-9]{16}"]}
    gate = {"name": "no-keys", "kind": "regex", "phase": "input", "config": config}
    with_evaluators(scene.platform, [], gate)
    before = (await scene.client.get("/v1/runs")).json()
    key = {"Idempotency-Key": "once"}
    refused = await scene.client.post("/v1/runs", json={"agent": "echo", "inputs": {"value": secret}}, headers=key)
    problem = refused.json()
    assert (refused.status_code, problem["code"], problem["reason"]) == (
        403,
        "authorization/forbidden",
        "evaluator_denied",
    )
    assert (problem["evaluator"], problem["rule"]) == ("no-keys", "evaluators.no-keys")
    assert "no run is created: evaluator no-keys denies" in problem["detail"]
    assert secret not in refused.text
    assert (await scene.client.get("/v1/runs")).json() == before
    events = [each for each in (await scene.client.get("/v1/events")).json()["items"] if each["kind"] == "run_refused"]
    assert [(each["stream"], each["payload"]["evaluator"]) for each in events] == [("tenant", "no-keys")]
    assert secret not in json.dumps(events)
    state = scene.platform.settings.state_dir
    files = sorted(path for path in state.rglob("*") if path.is_file())
    given = {"agent": "read-file", "files": {"file": {"name": f"{secret}.txt", "text": "x"}}}
    assert (await scene.client.post("/v1/runs", json=given)).json()["reason"] == "evaluator_denied"
    assert sorted(path for path in state.rglob("*") if path.is_file()) == files, "its file went with it"
    again = await scene.client.post("/v1/runs", json={"agent": "echo", "inputs": {"value": "fine"}}, headers=key)
    assert again.status_code == 202, "a key is not used up by what was refused"


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.EVALUATOR])
async def test_under_a_fault_the_api_answers_as_the_table_says(scene: Scene, fault: Fault) -> None:
    answers_due = due(TABLE, fault, REQUESTS)
    if fault is Fault.STORAGE_GONE:
        answers_due = dict.fromkeys(answers_due, "AUDIT_UNAVAILABLE")
    async with suffering(scene, fault):
        if fault is Fault.STORAGE_SLOW:  # nothing is changed, and each waits
            answers = dict(zip(answers_due, await asyncio.gather(*map(scene.ask, answers_due)), strict=True))
        else:
            answers = {operation: await scene.ask(operation) for operation in answers_due}
    assert answers == answers_due


async def test_where_the_audit_is_not_required_a_request_goes_on_without_its_record(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.sql("REVOKE INSERT ON audit_log FROM plm_engine_writer")
    refused = await scene.client.get(f"/v1/runs/{scene.run}")
    assert (refused.status_code, refused.json()["code"]) == (503, "AUDIT_UNAVAILABLE")
    monkeypatch.setenv("PLM_AUDIT_REQUIRED", "false")
    token = scene.client.headers["Authorization"].removeprefix("Bearer ")
    async with client_of(replace(scene.platform, settings=Settings()), token) as client:
        assert (await client.get(f"/v1/runs/{scene.run}")).status_code == 200


async def test_what_a_run_worker_was_told_stands_in_the_step_that_the_api_shows(scene: Scene) -> None:
    by = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.runs.create"}))
    run, denied = await ask(scene.platform, scene.tenant, by, "probe.blocked")
    assert isinstance(denied, Denied)
    (step,) = (await scene.client.get(f"/v1/runs/{run}")).json()["steps"]
    assert step["error"]["reason"] == denied.reason.value
