"""Tenants are kept apart by the database alone: the API without one condition on the tenant of its own.

The server runs from `unfiltered/`: each comparison of a tenant in its statements, in the database's functions
(`engine_admit_v1` and its kin) and in its view is replaced by a tautology. What is left is row-level security. The
functions that see across tenants by design (SECURITY DEFINER) stay as they are: they are `engine_abandoned_runs_v4` and
its like, which answer ids to recovery and nobody else. Not a filter, and kept too, is what `engine_enter_v1` refuses: a
transaction of a caller's that is bound to another tenant.

That these tests can fail is shown by the same server on a database whose row-level security is switched off: there
every operation that reads a tenant's rows lets the other tenant's through.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

HERE = Path(__file__).parent
PROGRAM = (sys.executable, HERE / "unfiltered")
OPERATIONS = {line.split()[0] for line in (HERE / "operations.txt").read_text(encoding="utf-8").splitlines()}
SCOPES = ("plm.runs.create", "plm.halt", "plm.hitl.resolve", "plm.budgets", "probe.write")
KEY = "a key that both tenants use"
COMPARED = re.compile(
    r"\btenant\w*\)?\s*(?:=|<>|!=|<|>|\bIS\b|\bIN\b|\bLIKE\b)|=\s*(?:\w+\.|ANY\s*\(\s*)?tenant_id|=\s*%\(tenant\)s",
    re.IGNORECASE,
)

READ_BY_NO_OPERATION = {
    "audit_log",
    "resource_leases",
    "pricing_snapshots",
    "event_checkpoints",
    "event_checkpoint_heads",
    "event_exports",
    "event_retention",
    "event_prunings",
    "idempotency_expiries",
    "event_stubs",
}
TENANT_TABLES = """
SELECT c.relname FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'tenant_id'
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' ORDER BY 1
"""


@dataclass(frozen=True, kw_only=True)
class Household:
    """What one tenant has: rows of every kind, with a secret in each text that it could choose."""

    tenant: uuid.UUID
    client: Any
    secret: str
    runs: tuple[str, ...]
    finished: str
    waiting: str
    ticket: str
    halt: str
    artifact: str
    scope: str
    cursors: dict[str, str]

    def ids(self) -> tuple[str, ...]:
        return (*self.runs, self.ticket, self.halt, self.artifact, self.scope)


@dataclass(frozen=True, kw_only=True)
class Unfiltered:
    """The server without its filters, and what it wrote down."""

    server: Any
    path: Path

    def journal(self, kind: str) -> list[dict[str, str]]:
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["kind"] == kind]

    def owned(self, tenant: uuid.UUID) -> dict[str, list[str]]:
        """Every row of a tenant, as its owner reads it."""
        with psycopg.connect(self.server.environment["PG_ADMIN_DSN"]) as owner:
            owner.execute("SELECT set_config('app.tenant_id', %s, true)", [str(tenant)])
            rows = {}
            for (table,) in owner.execute(TENANT_TABLES).fetchall():
                query = sql.SQL("SELECT t::text FROM {} AS t WHERE tenant_id = %s ORDER BY 1")
                rows[table] = [row for (row,) in owner.execute(query.format(sql.Identifier(table)), [tenant])]
            return rows


def _household(server: Any, tenant: uuid.UUID) -> Household:
    client, secret = server.client(tenant=tenant, scopes=SCOPES), f"secret-{secrets.token_hex(8)}"
    body = {"agent": "make-file", "inputs": {"name": "kept.txt", "mime_type": "text/plain", "text": secret}}
    finished = client.post("/v1/runs", json=body, headers={"Idempotency-Key": KEY}).json()["run_id"]
    waiting = [client.run("write", value=secret)["run_id"] for _ in range(2)]
    for run_id in waiting:
        client.wait(run_id, "approval_requested")
    approved = client.run("write", value=secret)["run_id"]
    client.wait(approved, "approval_requested")
    scope = _approved(server.client(tenant=tenant, scopes=("plm.hitl.resolve",)), approved, secret)
    client.finished(approved)
    done = client.finished(finished)
    halt = client.post("/v1/halts", json={"scope": "run", "scope_id": waiting[1], "reason": secret}).json()
    tickets = client.get("/v1/approvals").json()["items"]
    return Household(
        tenant=tenant,
        client=client,
        secret=secret,
        runs=(finished, *waiting, approved),
        finished=finished,
        waiting=waiting[0],
        ticket=next(ticket["ticket_id"] for ticket in tickets if ticket["run_id"] == waiting[0]),
        halt=halt["halt_id"],
        artifact=done["result"]["file"]["$artifact"],
        scope=scope,
        cursors={name: client.get(f"/v1/{name}?limit=1").json()["next"] for name in ("runs", "approvals", "events")},
    )


def _approved(approver: Any, run_id: str, secret: str) -> str:
    """Approve the ticket of a run with a comment and an approval scope, of which the id is answered."""
    tickets = approver.get("/v1/approvals?limit=200").json()["items"]
    path = "/v1/approvals/" + next(ticket["ticket_id"] for ticket in tickets if ticket["run_id"] == run_id)
    assert approver.post(f"{path}/comments", json={"body": secret}).status_code == 201
    offer = {"decision": "approve", "comment": secret, "scope": {"uses": 2, "seconds": 600}}
    assert approver.post(f"{path}/decision", json=offer).status_code == 200
    (scope,) = approver.get("/v1/approval-scopes").json()["items"]
    return str(scope["scope_id"])


Offered = tuple[Unfiltered, Household, Household]


@pytest.fixture(scope="module")
def unfiltered(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    @contextmanager
    def start(*statements: str) -> Iterator[Offered]:
        journal = tmp_path_factory.mktemp("unfiltered") / "journal"
        with launch(program=PROGRAM, UNFILTERED_JOURNAL=str(journal)) as server:
            subprocess.run([*PROGRAM, "strip-database"], env=server.environment, check=True, timeout=60)
            households = [_household(server, tenant) for tenant in (server.tenant, server.other_tenant)]
            with psycopg.connect(server.environment["PG_ADMIN_DSN"]) as owner:
                for statement in statements:
                    for (table,) in owner.execute(TENANT_TABLES).fetchall():
                        owner.execute(sql.SQL(statement).format(sql.Identifier(table)))
            yield Unfiltered(server=server, path=journal), *households

    return start


@pytest.fixture(scope="module")
def kept_apart(unfiltered: Callable[..., Any]) -> Iterator[Offered]:
    """No filters, but row-level security: first the tenant that is spied on, then the spy."""
    with unfiltered() as offered:
        yield offered


@pytest.fixture(scope="module")
def open_house(unfiltered: Callable[..., Any]) -> Iterator[Offered]:
    """The control: neither filters nor row-level security."""
    with unfiltered("ALTER TABLE {} DISABLE ROW LEVEL SECURITY") as offered:
        yield offered


@dataclass(frozen=True, kw_only=True)
class Target:
    """Ids to ask for: another tenant's, or such as exist nowhere."""

    run: str
    waiting: str
    ticket: str
    halt: str
    artifact: str
    scope: str


def _foreign(of: Household) -> Target:
    return Target(
        run=of.finished, waiting=of.waiting, ticket=of.ticket, halt=of.halt, artifact=of.artifact, scope=of.scope
    )


def _absent() -> Target:
    return Target(**{name: str(uuid.uuid4()) for name in Target.__dataclass_fields__})


_CALLS = {"scope": "run", "unit": "calls", "amount": "1", "reason": "spying"}

# By operation: a request that names something by its id.
BY_ID: dict[str, Callable[[Target], tuple[str, str, Any]]] = {
    "getRun": lambda ids: ("GET", f"/v1/runs/{ids.run}", None),
    "getRunMcrc": lambda ids: ("GET", f"/v1/runs/{ids.run}/mcrc", None),
    "followRun": lambda ids: ("GET", f"/v1/runs/{ids.run}/events", None),
    "getArtifact": lambda ids: ("GET", f"/v1/artifacts/{ids.artifact}", None),
    "cancelRun": lambda ids: ("POST", f"/v1/runs/{ids.waiting}/cancel", None),
    "getApproval": lambda ids: ("GET", f"/v1/approvals/{ids.ticket}", None),
    "commentApproval": lambda ids: ("POST", f"/v1/approvals/{ids.ticket}/comments", {"body": "spying"}),
    "revokeApprovalScope": lambda ids: ("DELETE", f"/v1/approval-scopes/{ids.scope}", None),
    "decideApproval": lambda ids: ("POST", f"/v1/approvals/{ids.ticket}/decision", {"decision": "approve"}),
    "triggerHalt": lambda ids: ("POST", "/v1/halts", {"scope": "run", "scope_id": ids.waiting, "reason": "spying"}),
    "explain": lambda ids: ("GET", f"/v1/why?id={ids.run}", None),
    "verifyEvents": lambda ids: ("GET", f"/v1/events/verification?stream=run/{ids.run}", None),
    "correctBudget": lambda ids: ("POST", "/v1/budgets/corrections", {**_CALLS, "subject": ids.run}),
    "getHalt": lambda ids: ("GET", f"/v1/halts/{ids.halt}", None),
    "liftHalt": lambda ids: ("DELETE", f"/v1/halts/{ids.halt}", None),
}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _by_id(operation: str, spy: Household, other: Household) -> tuple[bool, str]:
    """Whether the answer to another tenant's id differs from that to one which exists nowhere."""
    answers = []
    for ids in (_foreign(other), _absent()):
        method, path, body = BY_ID[operation](ids)
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        answer = spy.client.request(method, path, json=body, headers=headers)
        answers.append((answer.status_code, UUID.sub("ID", answer.text)))
    assert answers[1][0] == 404
    return answers[0] != answers[1], answers[0][1]


def _listed(name: str, spy: Household, other: Household) -> tuple[bool, str]:
    """Whether a list, begun anywhere, holds anything but the spy's own."""
    texts = ""
    for cursor in (None, spy.cursors[name], other.cursors[name]):
        for state in (None, "pending" if name == "approvals" else "awaiting_approval"):
            given = {"limit": 200, "cursor": cursor, "state": state}
            answer = spy.client.get(f"/v1/{name}", params={key: value for key, value in given.items() if value})
            assert answer.status_code == 200
            texts += answer.text
    return any(each in texts for each in other.runs), texts


def _created(spy: Household, other: Household) -> tuple[bool, str]:
    """Whether a key that the other tenant used as well, for another request, is taken for the spy's own."""
    body = {"agent": "make-file", "inputs": {"name": "kept.txt", "mime_type": "text/plain", "text": spy.secret}}
    answer = spy.client.post("/v1/runs", json=body, headers={"Idempotency-Key": KEY})
    return answer.json().get("run_id") != spy.finished, answer.text


def _fed(spy: Household, other: Household) -> tuple[bool, str]:
    """Whether the feed holds anything but the spy's own, or may be begun where another's was left."""
    answer = spy.client.get("/v1/events?limit=200")
    assert answer.status_code == 200
    foreign = spy.client.get("/v1/events", params={"cursor": other.cursors["events"]})
    assert (foreign.status_code, foreign.json()["field"]) == (422, "cursor")
    texts = answer.text + foreign.text
    return any(each in texts for each in other.runs), texts


def _halts(spy: Household, other: Household) -> tuple[bool, str]:
    """Whether the halts hold another's."""
    answer = spy.client.get("/v1/halts?limit=200")
    return other.halt in answer.text, answer.text


def _standing(spy: Household, other: Household) -> tuple[bool, str]:
    """Whether the approval scopes hold another's."""
    answer = spy.client.get("/v1/approval-scopes?limit=200")
    return other.scope in answer.text, answer.text


def _budgets(spy: Household, other: Household) -> tuple[bool, str]:
    """Whether the budgets hold another's."""
    found, cursor = "", ""
    while cursor is not None:
        answer = spy.client.get(f"/v1/budgets?limit=200{cursor and '&cursor='}{cursor}")
        found, cursor = found + answer.text, answer.json()["next"]
    return any(each in found for each in other.runs), found


SCENARIOS: dict[str, Callable[[Household, Household], tuple[bool, str]]] = {
    **{operation: lambda *two, operation=operation: _by_id(operation, *two) for operation in BY_ID},
    "listRuns": lambda *two: _listed("runs", *two),
    "listApprovals": lambda *two: _listed("approvals", *two),
    "listEvents": _fed,
    "listApprovalScopes": _standing,
    "listHalts": _halts,
    "listBudgets": _budgets,
    "createRun": _created,
}
WITHOUT_TENANT = {"live": "/v1/health/live", "ready": "/v1/health/ready"}
ITS_OWN = {"setBudget"}  # opens a budget of the caller's tenant, whatever it names; below
OF_THE_INSTALLATION = {  # one policy and one register for all tenants; test_api_policy.py, test_api_registers.py
    "getPolicy",
    "activatePolicy",
    "listCapabilities",
    "listAgents",
    "setAgentStatus",
}


def test_every_operation_has_its_scenario(kept_apart: Offered) -> None:
    document = kept_apart[1].client.get("/openapi.json").json()
    served = {each["operationId"] for path in document["paths"].values() for each in path.values()}
    assert served == OPERATIONS == SCENARIOS.keys() | WITHOUT_TENANT.keys() | ITS_OWN | OF_THE_INSTALLATION


@pytest.mark.parametrize("operation", sorted(SCENARIOS))
def test_no_operation_tells_or_changes_anything_of_another_tenant(operation: str, kept_apart: Offered) -> None:
    unfiltered, other, spy = kept_apart
    before = unfiltered.owned(other.tenant)
    leaked, text = SCENARIOS[operation](spy, other)
    assert not leaked, text
    assert other.secret not in text
    assert unfiltered.owned(other.tenant) == before
    assert unfiltered.journal("foreign") == []


@pytest.mark.parametrize("operation", sorted(SCENARIOS))
def test_without_row_level_security_the_same_requests_would_tell(operation: str, open_house: Offered) -> None:
    _, other, spy = open_house
    leaked, text = SCENARIOS[operation](spy, other)
    assert leaked, text


@pytest.mark.parametrize("operation", sorted(WITHOUT_TENANT))
def test_what_anybody_may_ask_tells_nothing_of_anybody(operation: str, kept_apart: Offered) -> None:
    unfiltered, *households = kept_apart
    text = unfiltered.server.anonymous().get(WITHOUT_TENANT[operation]).text
    assert not any(each in text for household in households for each in (*household.ids(), household.secret))


def test_no_statement_and_no_function_is_left_that_compares_a_tenant(kept_apart: Offered) -> None:
    unfiltered, *_ = kept_apart
    statements, functions = unfiltered.journal("statement"), unfiltered.journal("database")
    stripped = [each for each in statements if each["sent"] != each["became"]]
    assert [each["sent"] for each in statements if COMPARED.search(each["sent"])] == [each["sent"] for each in stripped]
    assert [each["became"] for each in (*stripped, *functions) if COMPARED.search(each["became"])] == []
    with unfiltered.server.database() as owner:
        kept = "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef IS FALSE"
        assert [name for name, source in owner.execute(kept) if COMPARED.search(source)] == []
        tables = {name for (name,) in owner.execute(TENANT_TABLES)} - READ_BY_NO_OPERATION
    texts = " ".join([*(each["sent"] for each in stripped), *(each["changed"] for each in functions)])
    assert {table for table in tables if not re.search(rf"\b{table}\b", texts)} == set()


def test_without_row_level_security_rows_of_another_tenant_would_be_read(open_house: Offered) -> None:
    unfiltered, other, spy = open_house
    assert other.runs[0] in spy.client.get("/v1/runs?limit=200").text
    assert {row["tenant"] for row in unfiltered.journal("foreign")} >= {str(other.tenant)}


def test_a_call_is_given_no_file_of_another_tenant(kept_apart: Offered) -> None:
    _, other, spy = kept_apart
    file = other.client.get(f"/v1/runs/{other.finished}").json()["result"]["file"]
    run_id = spy.client.run("read-reference", file=file)["run_id"]
    ended = spy.client.finished(run_id)
    assert (ended["state"], ended["result"]) == ("failed", None)
    assert other.secret not in str(ended) + str([message.data for message in spy.client.events(run_id)])


def test_a_run_shows_the_budgets_of_its_own_tenant(kept_apart: Offered) -> None:
    _, *households = kept_apart
    for each in households:
        budgets = each.client.get(f"/v1/runs/{each.finished}").json()["budgets"]
        assert [(budget["scope"], budget["unit"]) for budget in budgets] == [
            ("run", "EUR"),
            ("run", "calls"),
            ("tenant", "EUR"),
            ("tenant", "calls"),
        ]


def test_a_limit_is_set_in_the_caller_s_own_books_whatever_it_names(kept_apart: Offered) -> None:
    unfiltered, other, spy = kept_apart
    before = unfiltered.owned(other.tenant)
    for scope, subject, status in (
        ("tenant", str(other.tenant), 422),
        ("run", other.finished, 200),
        ("model", "m", 200),
    ):
        body = {"scope": scope, "subject": subject, "unit": "calls", "limit": "0"}
        assert spy.client.put("/v1/budgets", json=body).status_code == status
    assert unfiltered.owned(other.tenant) == before


def _operator(unfiltered: Unfiltered, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=unfiltered.server.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_operator_who_acts_for_one_tenant_reaches_no_other(kept_apart: Offered, open_house: Offered) -> None:
    for (unfiltered, other, spy), isolated in ((kept_apart, True), (open_house, False)):
        acting = ("--tenant-id", str(spy.tenant))
        streams = json.loads(_operator(unfiltered, "events", "verify", *acting, "--json").stdout)["streams"]
        names = {stream["stream"] for stream in streams}
        assert names >= {f"run/{run_id}" for run_id in spy.runs}
        assert names.isdisjoint(f"run/{run_id}" for run_id in other.runs) is isolated
        refusals = []
        for run_id in (other.finished, str(uuid.uuid4())):
            refused = _operator(unfiltered, "run", "reconcile", run_id, *acting, "--did-not")
            assert refused.returncode != 0
            refusals.append(UUID.sub("ID", refused.stderr))
        assert (refusals[0] == refusals[1]) is isolated, refusals


def test_two_tenants_halt_lift_and_finish_without_touching_each_other(kept_apart: Offered, tmp_path: Path) -> None:
    unfiltered, *households = kept_apart
    gate, halts, runs = tmp_path / "gate", [], []
    for each in households:
        run_id = each.client.run("hold-then-echo", gate=str(gate))["run_id"]
        runs.append(run_id)
        each.client.wait(run_id, "step_started")
    for each, run_id in zip(households, runs, strict=True):
        halted = each.client.post("/v1/halts", json={"scope": "tenant", "reason": each.secret})
        halts.append(halted.json()["halt_id"])
        each.client.wait(run_id, "run_parked")
    gate.touch()
    (first, second), (run, other_run) = households, runs
    assert first.client.delete(f"/v1/halts/{halts[0]}").status_code == 200
    assert first.client.finished(run)["state"] == "succeeded"
    assert second.client.get(f"/v1/runs/{other_run}").json()["state"] == "halted"
    assert second.client.delete(f"/v1/halts/{halts[1]}").status_code == 200
    assert second.client.finished(other_run)["state"] == "succeeded"
    for own, foreign, run_id in ((first, second, run), (second, first, other_run)):
        messages = list(own.client.events(run_id))
        assert [int(message.id) for message in messages] == list(range(1, len(messages) + 1))
        assert foreign.secret not in str([message.data for message in messages])
    assert unfiltered.journal("foreign") == []
