"""`plm-cli approvals`: an operator decides as a person, with the reasons and codes of the API."""

from __future__ import annotations

import uuid
from functools import partial

import jwt
import psycopg
import pytest
from plm_engine_core.control_plane import InputRequest
from plm_engine_core.control_plane.vocabulary import TicketState
from typer.testing import CliRunner


async def test_a_ticket_is_listed_shown_commented_and_approved(terminal, bench):
    _, pending = await bench.ask()
    listed = await terminal.json("approvals", "list")
    assert [each["id"] for each in listed["items"]] == [str(pending.ticket_id)]
    assert "thing.write on thing/1" in (await terminal.run("approvals", "list")).stdout
    await terminal.run("approvals", "comment", pending.ticket_id, "looks right")
    approved = await terminal.json("approvals", "approve", pending.ticket_id, "--comment", "go")
    assert approved["state"] == "approved"
    shown = await terminal.json("approvals", "show", pending.ticket_id)
    assert shown["needs"] == {"scopes": ["plm.hitl.resolve"], "quorum": 1}
    assert [(vote["vote"], vote["comment"]) for vote in shown["votes"]] == [("approve", "go")]
    assert [comment["body"] for comment in shown["comments"]] == ["looks right"]
    assert "needs: 1 with plm.hitl.resolve" in (await terminal.run("approvals", "show", pending.ticket_id)).stdout
    assert (await terminal.json("approvals", "list"))["items"] == []
    assert len((await terminal.json("approvals", "list", "--all"))["items"]) == 1


async def test_who_says_what_was_read_decides_nothing_else(terminal, bench):
    _, pending = await bench.ask()
    read = (await terminal.json("approvals", "show", pending.ticket_id))["revision"]
    assert f"revision: {read}" in (await terminal.run("approvals", "show", pending.ticket_id)).stdout
    await terminal.run("approvals", "comment", pending.ticket_id, "wait")
    for verb in ("approve", "deny"):
        refused = await terminal.json("approvals", verb, pending.ticket_id, "--as-read", read, status=1)
        assert (refused["refused"], refused["reason"]) == ("conflict", "changed_meanwhile")
    read = (await terminal.json("approvals", "show", pending.ticket_id))["revision"]
    assert (await terminal.json("approvals", "deny", pending.ticket_id, "--as-read", read))["state"] == "denied"


async def test_what_an_agent_wrote_cannot_pass_for_what_the_terminal_says(terminal, bench):
    forged = "thing/1\x1b[2K\x07\rstate: approved\nrisk: low\u202e"
    _, pending = await bench.ask(resource=forged)
    await terminal.run("approvals", "comment", pending.ticket_id, "well\nneeds: nobody")
    for command in (("approvals", "list"), ("approvals", "show", pending.ticket_id)):
        lines = (await terminal.run(*command)).stdout.splitlines()
        assert all(line.isprintable() for line in lines), lines
        assert not [line for line in lines if line.startswith(("risk: low", "needs: nobody"))]
    assert (await terminal.json("approvals", "show", pending.ticket_id))["resource"] == forged


async def test_a_ticket_is_denied_and_nobody_is_asked_twice(terminal, bench):
    _, pending = await bench.ask()
    assert "is denied" in (await terminal.run("approvals", "deny", pending.ticket_id)).stdout
    refused = await terminal.json("approvals", "approve", pending.ticket_id, status=1)
    assert (refused["refused"], refused["reason"]) == ("conflict", "already_decided")


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"scopes": ["plm.halt"]}, "missing_scopes"),
        ({"actor_kind": "agent"}, "not_human"),
        ({"sub": "requester"}, "separation_of_duties"),
    ],
)
async def test_who_may_not_decide_is_told_why_as_by_the_api(terminal, bench, claims, reason):
    _, pending = await bench.ask()
    if "sub" in claims:
        claims = {"sub": str(bench.requester.user_id)}
    said = await terminal.run("approvals", "approve", pending.ticket_id, status=1, token=terminal.token(**claims))
    assert said.stderr.rstrip().endswith(f"[{reason}]")
    ticket = await bench.storage.approvals.get(bench.tenant, pending.ticket_id)
    assert ticket.state is TicketState.PENDING


async def test_without_a_token_an_address_or_a_policy_nothing_is_tried(terminal, bench, tmp_path):
    _, pending = await bench.ask()
    approve = ("approvals", "approve", pending.ticket_id)
    assert "PLM_TOKEN" in (await terminal.run(*approve, status=3, token="")).stderr
    assert "IDENTITY_MALFORMED" in (await terminal.run(*approve, status=3, token="no token")).stderr
    assert "PG_DSN" in (await terminal.run(*approve, status=3, PG_DSN="")).stderr
    assert "policy" in (await terminal.run(*approve, status=3, PLM_POLICY=str(tmp_path / "none.yaml"))).stderr
    assert (await terminal.run("approvals", "approve", "x", status=2)).exit_code == 2


async def test_a_token_of_a_tenant_that_does_not_exist_is_refused_as_by_the_api(terminal):
    nobodys = terminal.token(tenant_id=str(uuid.uuid4()))
    said = await terminal.json("approvals", "list", status=3, token=nobodys)
    assert (said["refused"], said["reason"]) == ("IDENTITY_MALFORMED", "unknown_tenant")
    run = ("run", "reconcile", uuid.uuid4(), "--tenant-id", uuid.uuid4(), "--happened")
    assert (await terminal.json(*run, status=1))["reason"] == "not_found"


def expired(terminal):
    secret = terminal.environment["PLM_IDENTITY_HS256_SECRET_ACTIVE"]
    claims = jwt.decode(terminal.token(), secret, ["HS256"])
    return jwt.encode({**claims, "iat": 1, "exp": 2}, secret)


async def test_a_refused_token_is_in_the_audit_log_of_whom_it_names_and_never_itself(terminal, bench):
    over = expired(terminal)
    forged = terminal.token()[:-4] + "AAAA"
    for token, reason in ((over, "expired"), (forged, "bad_signature"), ("garbage", "malformed_token")):
        said = await terminal.json("approvals", "list", status=3, token=token)
        assert said["reason"] == reason
    (row,) = bench.sql(
        "SELECT tenant_id, user_id, payload FROM audit_log WHERE tenant_id = %s AND event_type = 'identity.reject'",
        bench.tenant,
    )
    assert row[:2] == (bench.tenant, None)
    facts = {"reason": "expired", "code": "IDENTITY_EXPIRED", "provider": "hs256"}
    assert row[2] == {**facts, "surface": "plm-cli"}
    with psycopg.connect(bench.database.owner) as owner:
        told = owner.execute("SELECT payload FROM audit_log_system WHERE event_type = 'identity.reject'").fetchall()
    ours = [payload for (payload,) in told if payload["client"] == "plm-cli"]
    assert {"bad_signature", "malformed_token"} <= {payload["reason"] for payload in ours}
    assert not any(token in str(payload) for token in (over, forged) for payload in [row[2], *ours])


async def test_who_acts_is_in_the_audit_log(terminal, bench):
    user = uuid.uuid4()
    await terminal.run("approvals", "list", token=terminal.token(user))
    told = "SELECT event_type, payload ->> 'surface' FROM audit_log WHERE user_id = %s"
    assert bench.sql(told, user) == [("identity.bind", "plm-cli")]


async def test_without_its_audit_record_a_command_does_nothing_unless_the_operator_says_so(terminal, bench):
    user = uuid.uuid4()
    bench.sql("REVOKE INSERT ON audit_log, audit_log_system FROM plm_engine_writer")
    refused = await terminal.json("approvals", "list", status=1, token=terminal.token(user))
    assert refused["reason"] == "AUDIT_UNAVAILABLE"
    told = await terminal.run("approvals", "list", token=terminal.token(user), PLM_AUDIT_REQUIRED="false")
    assert f"identity.bind of tenant {bench.tenant} is not in the audit log" in told.stderr
    for required in ("true", "false"):  # a refused token is refused whatever becomes of its record
        said = await terminal.json("approvals", "list", status=3, token=expired(terminal), PLM_AUDIT_REQUIRED=required)
        assert said["reason"] == "expired"
    unclear = await terminal.run("approvals", "list", status=3, PLM_AUDIT_REQUIRED="perhaps")
    assert "PLM_AUDIT_REQUIRED is 'perhaps'; set it to true or false" in unclear.stderr
    assert bench.sql("SELECT count(*) FROM audit_log WHERE user_id = %s", user) == [(0,)]


@pytest.mark.parametrize("required", ["true", "false"])
async def test_a_refused_token_is_refused_where_the_database_is_away(terminal, required):
    away = {"PG_DSN": "postgresql://plm_app:x@127.0.0.1:9/none", "PLM_AUDIT_REQUIRED": required}
    said = await terminal.run("approvals", "list", status=3, token="garbage", **away)
    assert "PLM_TOKEN is refused" in said.stderr
    assert "identity.reject of the installation is not in the audit log" in said.stderr
    assert "Traceback" not in said.stderr


async def test_an_approval_scope_is_offered_listed_and_revoked(terminal, bench):
    bench = bench.with_policy(approval={"standing": {"max_uses": 5, "max_seconds": 60, "max_risk": "high"}})
    _, pending = await bench.ask()
    await terminal.run("approvals", "approve", pending.ticket_id, "--scope-uses", 9, status=2)
    await terminal.run("approvals", "approve", pending.ticket_id, "--scope-any-resource", status=2)
    too_much = ("approvals", "approve", pending.ticket_id, "--scope-uses", 9, "--scope-seconds", 60)
    assert "[scope_not_allowed]" in (await terminal.run(*too_much, status=1)).stderr
    await terminal.run("approvals", "approve", pending.ticket_id, "--scope-uses", 3, "--scope-seconds", 60)
    (scope,) = (await terminal.json("approvals", "scopes"))["items"]
    assert (scope["max_uses"], scope["used"]) == (3, 0)
    assert "0/3" in (await terminal.run("approvals", "scopes")).stdout
    assert (await terminal.json("approvals", "revoke-scope", scope["id"]))["revoked_at"] is not None


class TestAsk:
    """A ticket that asks for an input."""

    @pytest.fixture
    async def ask(self, bench):
        asking = bench.with_policy(approval={"input": {}})
        lease = await asking.lease()
        pending = await asking.control_plane.ask(
            InputRequest(
                tenant_id=asking.tenant,
                run_id=lease.run.id,
                fencing_token=lease.fencing_token,
                step_index=0,
                attempt=1,
                step_id="many",
                question="How many?\nneeds: nobody",
                schema={"type": "integer"},
                principal=lease.run.principal,
            )
        )
        return str(pending.ticket_id)

    async def test_it_is_listed_shown_and_answered(self, terminal, ask):
        (listed,) = (await terminal.json("approvals", "list"))["items"]
        assert (listed["id"], listed["kind"]) == (ask, "input")
        assert "input: How many?" in (await terminal.run("approvals", "list")).stdout
        shown = (await terminal.run("approvals", "show", ask)).stdout.splitlines()
        assert 'schema: {"type": "integer"}' in shown
        assert [line for line in shown if line.startswith("needs:")] == ["needs: 1 with plm.hitl.resolve"]
        given = await terminal.json("approvals", "provide-input", ask, "--input", "3", "--comment", "as ever")
        assert (given["state"], given["input"], given["comment"]) == ("approved", 3, "as ever")
        shown = (await terminal.run("approvals", "show", ask)).stdout.splitlines()
        assert "input: 3" in shown

    async def test_it_is_read_from_a_file(self, terminal, ask, tmp_path):
        (tmp_path / "answer.json").write_text("4\n")
        given = ("approvals", "provide-input", ask, "--input", f"@{tmp_path / 'answer.json'}")
        assert (await terminal.json(*given))["input"] == 4

    async def test_it_is_read_from_standard_input(self, terminal, ask, monkeypatch):
        typed = partial(CliRunner().invoke, input="5\n")
        monkeypatch.setattr(CliRunner, "invoke", lambda _, *given, **settings: typed(*given, **settings))
        assert (await terminal.json("approvals", "provide-input", ask))["input"] == 5

    async def test_what_is_no_json_is_refused_and_not_repeated(self, terminal, ask):
        said = await terminal.run("approvals", "provide-input", ask, "--input", "hunter2", status=2)
        assert "the input is no JSON at line 1, column 1" in said.stderr
        assert "hunter2" not in said.stdout + said.stderr

    async def test_a_wrong_input_is_refused_by_its_path(self, terminal, ask):
        refused = await terminal.json("approvals", "provide-input", ask, "--input", '"hunter2"', status=1)
        assert (refused["refused"], "input breaks 'type' of its schema" in refused["message"]) == (
            "invalid_request",
            True,
        )
        assert "hunter2" not in str(refused)

    async def test_it_cannot_be_approved(self, terminal, ask):
        refused = await terminal.json("approvals", "approve", ask, status=1)
        assert (refused["refused"], refused["reason"]) == ("conflict", "ticket_kind")
