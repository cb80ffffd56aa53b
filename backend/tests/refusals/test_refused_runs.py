"""Runs that are refused on their way or go wrong: each ends, or is parked where everybody sees it, and says why."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

TABLE = "Runs"
Left = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Each answers a server, a client, a run of it, and words that the run's message must hold."""

    _platform: Any
    _client: Any
    _approver: Any
    _gate: Any
    _cleanup: ExitStack
    _own_server: Callable[..., Any]
    _launch: Callable[..., Any]
    _altered_policy: Callable[..., str]
    _tmp_path: Path

    # -- refused by admission

    def capability_that_the_policy_blocks(self) -> Left:
        return self._run("blocked", says="the policy blocks probe.blocked")

    def capability_that_the_policy_steers_away_from(self) -> Left:
        return self._run("steered", says="steers probe.steered: use probe.echo instead")

    def call_that_a_rule_of_the_policy_denies(self) -> Left:
        rule = {"id": "no-echo", "capabilities": ["probe.echo"], "then": "deny", "reason": "the probe is closed"}
        policy = self._altered_policy(rules=[rule])
        return self._under(policy, "echo", "the rule no-echo denies probe.echo: the probe is closed")

    def capability_beyond_the_caller_s_scopes(self) -> Left:
        client = self._platform.client(scopes=("plm.runs.create",))
        return self._platform, client, client.run("write")["run_id"], "probe.write"

    def capability_beyond_the_autonomy(self) -> Left:
        return self._under(self._altered_policy(autonomy_ceiling="L1"), "write", "probe.write", "autonomy L1")

    def capability_that_is_not_registered_any_more(self) -> Left:
        with self._launch(PLM_RUN_CONCURRENCY="0") as accepts:
            run_id = accepts.client().run("echo")["run_id"]
        return *self._server_without("probe.echo", like=accepts), run_id, "not registered", "ask the operator"

    def call_that_was_open_when_its_capability_went(self) -> Left:
        with self._launch() as killed:
            run_id = killed.client().run("hold", gate=str(self._gate))["run_id"]
            self._gate.entered()
            killed.stop(signal.SIGKILL)
        return *self._server_without("probe.hold", like=killed), run_id, "probe.hold", "may have had its effect"

    def capability_that_no_plugin_serves(self) -> Left:
        return self._run("absent", says="no plugin of this node offers probe.absent")

    def budget_too_small_for_a_call(self) -> Left:
        body = {"agent": "usage", "inputs": {"unit": "page", "amount": "1"}, "budget": {"EUR": "0.5"}}
        run_id = self._client.post("/v1/runs", json=body).json()["run_id"]
        return self._platform, self._client, run_id, "the run budget is too small", "limit 0.5 EUR", "needed 0.75"

    def call_dearer_than_the_policy_allows(self) -> Left:
        policy = self._altered_policy(max_eur_per_call="0.5")
        return self._under(policy, "usage", "0.75 EUR", "allows 0.5 EUR per call", unit="page", amount="1")

    def proposals_faster_than_the_policy_allows(self) -> Left:
        self._gate.open()
        policy = self._altered_policy(rate_limit={"per_second": 0.5, "burst": 1})
        return self._under(policy, "hold-then-echo", "faster than its policy allows", gate=str(self._gate))

    def resource_that_another_call_holds(self) -> Left:
        registered = self._registered(self._platform)
        locking = [{**each, "lock": "tenant"} if each["id"] == "probe.hold" else each for each in registered]
        server = self._cleanup.enter_context(self._own_server(PLM_CAPABILITIES=self._capabilities(locking)))
        client = server.client()
        holder = client.run("hold", gate=str(self._gate))["run_id"]
        self._gate.entered()
        run_id = client.run("hold", gate=str(self._gate))["run_id"]
        client.wait(run_id, "step_denied")
        self._gate.open()
        return server, client, run_id, f"is locked by step 0 of run {holder}"

    # -- halted, parked, cancelled

    def halt_before_it_began(self) -> Left:
        client = self._platform.client(tenant=self._platform.other_tenant)
        self._halted(client, scope="tenant", reason="before anything")
        return self._platform, client, client.run("echo")["run_id"], "a tenant halt stands: before anything"

    def halt_while_a_call_runs(self) -> Left:
        run_id = self._holding()
        self._halted(self._client, scope="run", scope_id=run_id, reason="look first")
        return self._platform, self._client, run_id, "a run halt stands: look first"

    def halt_after_the_end(self) -> Left:
        run_id = self._client.run("echo")["run_id"]
        self._client.finished(run_id)
        self._halted(self._client, scope="run", scope_id=run_id, reason="too late")
        return self._platform, self._client, run_id

    def call_that_needs_approval(self) -> Left:
        return self._run("write", says="probe.write needs the approval of a human")

    def approval_denied(self) -> Left:
        run_id = self._client.run("write")["run_id"]
        self._decide(self._client, self._approver, run_id, "deny", "not on a Friday")
        return self._platform, self._client, run_id, "not on a Friday"

    def approval_not_given_in_time(self) -> Left:
        policy = self._altered_policy(approval={"timeout_seconds": 0.2, "required_scope": "plm.hitl.resolve"})
        return self._under(policy, "write", "the approval")

    def agent_that_asks_for_an_input(self) -> Left:
        return self._run("ask", says="How many are wanted?")

    def input_denied(self) -> Left:
        run_id = self._client.run("ask")["run_id"]
        self._decide(self._client, self._approver, run_id, "deny", "nobody knows")
        return self._platform, self._client, run_id, "step many: no input was given: nobody knows"

    def input_not_given_in_time(self) -> Left:
        policy = self._altered_policy(approval={"input": {"timeout_seconds": 0.2}})
        return self._under(policy, "ask", "nobody gave the input until")

    def agent_that_asks_without_leave(self) -> Left:
        policy = self._altered_policy(approval={"required_scope": "plm.hitl.resolve"})
        return self._under(policy, "ask", "the policy lets no agent ask")

    def approval_under_another_policy(self) -> Left:
        with self._launch() as asked:
            run_id = asked.client().run("write")["run_id"]
            asked.client().wait(run_id, "approval_requested")
        policy = self._altered_policy(version="another")
        server = self._cleanup.enter_context(self._own_server(like=asked, PLM_POLICY=policy))
        client = server.client()
        self._decide(client, server.client(scopes=("plm.hitl.resolve",)), run_id, "approve", then=("step_denied",))
        return server, client, run_id, "probe.write needs the approval of a human"

    def cancelled_while_a_call_runs(self) -> Left:
        run_id = self._holding()
        assert self._client.post(f"/v1/runs/{run_id}/cancel").status_code == 200
        return self._platform, self._client, run_id, "cancelled on request"

    # -- plugins

    def plugin_refuses_what_it_was_given(self) -> Left:
        return self._run("fail", kind="user_input", says="step act: this is a user_input error")

    def plugin_says_not_now(self) -> Left:
        return self._run("fail", kind="transient", says="this is a transient error")

    def plugin_lacks_resources(self) -> Left:
        return self._run("fail", kind="resource", says="this is a resource error")

    def plugin_gives_up(self) -> Left:
        return self._run("fail", kind="fatal", says="this is a fatal error")

    def plugin_raises(self) -> Left:
        return self._run("misbehave", how="raise", says="RuntimeError: this plugin has a defect")

    def plugin_raises_something_without_words(self) -> Left:
        return self._run("misbehave", how="raise without words", says="Unprintable")

    def plugin_leaves_by_sys_exit(self) -> Left:
        return self._run("misbehave", how="leave", says="SystemExit: 3")

    def plugin_exits_idempotent(self) -> Left:
        return self._run("die", says="6 times; the last time: the worker ended with status 9")

    def plugin_exits_where_a_human_is_asked_first(self) -> Left:
        return self._under(self._altered_policy(approval={"input": {}}), "die", "as attempts_exhausted", '"again"')

    def plugin_is_killed_idempotent(self) -> Left:
        return self._run("misbehave", how="be killed", says="6 times; the last time: the worker was ended by SIGKILL")

    def plugin_exits_not_idempotent(self) -> Left:
        return self._run("fragile", journal=str(self._tmp_path / "journal"), says="the worker ended with status 7")

    def plugin_hangs(self) -> Left:
        return self._run("short", gate=str(self._gate), says="probe.short did not end within its 0.5 s")

    def plugin_hangs_and_is_deaf_not_idempotent(self) -> Left:
        return self._run("hang", gate=str(self._gate), says="fragile.hang did not end within its 0.2 s")

    def plugin_floods_its_reports(self) -> Left:
        return self._run("misbehave", how="flood")

    def plugin_returns_too_much(self) -> Left:
        return self._run("misbehave", how="9000000", says="over the limit of 8388608")

    def plugin_returns_a_number_that_is_none(self) -> Left:
        return self._nonsense("a number that is none", "the plugin's result: nan is not a finite number")

    def plugin_returns_an_object(self) -> Left:
        return self._nonsense("an object", "builtins.object cannot cross the process border")

    def plugin_returns_a_list_that_holds_itself(self) -> Left:
        return self._nonsense("a list that holds itself", "nested deeper than 64 levels")

    def plugin_returns_bytes(self) -> Left:
        return self._nonsense("bytes", "which JSON does not have")

    def plugin_returns_text_with_nul(self) -> Left:
        return self._nonsense("a text with NUL", "output.text: contains U+0000")

    def plugin_returns_half_a_surrogate_pair(self) -> Left:
        return self._nonsense("half a surrogate pair", "output.text: contains half a surrogate pair")

    def plugin_returns_a_file_with_an_odd_name(self) -> Left:
        return self._run("make-file", name="../passwd", mime_type="text/plain", text="x", says="'../passwd'")

    # -- plans

    def plan_uses_a_result_that_does_not_exist(self) -> Left:
        return self._run("lost-argument", says="step second: 'steps.first.output.value.absent' leads nowhere")

    def plan_ends_with_a_result_that_does_not_exist(self) -> Left:
        return self._run("lost-result", says="result: 'steps.act.output.absent' leads nowhere")

    def file_of_another_run(self) -> Left:
        made = self._client.run("make-file", name="a.txt", mime_type="text/plain", text="mine")
        file = self._client.finished(made["run_id"])["result"]["file"]
        return self._run("read-reference", file=file, says=f"artifact {file['$artifact']} belongs to another run")

    # -- how

    def _run(self, agent: str, *, says: str = "", **inputs: Any) -> Left:
        return self._platform, self._client, self._client.run(agent, **inputs)["run_id"], says

    def _nonsense(self, what: str, says: str) -> Left:
        return self._run("nonsense", what=what, says=says)

    def _under(self, policy: str, agent: str, *says: str, **inputs: Any) -> Left:
        server = self._cleanup.enter_context(self._own_server(PLM_POLICY=policy))
        client = server.client()
        return server, client, client.run(agent, **inputs)["run_id"], *says

    def _server_without(self, capability: str, *, like: Any) -> tuple[Any, Any]:
        """A server over the same books, where a capability is not registered and no plan names it."""
        left = [each for each in self._registered(like) if each["id"] != capability]
        (self._tmp_path / "agents").mkdir()
        settings = {"PLM_CAPABILITIES": self._capabilities(left), "PLM_AGENTS": str(self._tmp_path / "agents")}
        server = self._cleanup.enter_context(self._own_server(like=like, PLM_RUN_CONCURRENCY="8", **settings))
        return server, server.client()

    @staticmethod
    def _registered(server: Any) -> list[dict[str, Any]]:
        path = Path(server.environment["PLM_CAPABILITIES"])
        capabilities: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))["capabilities"]
        return capabilities

    def _capabilities(self, capabilities: list[dict[str, Any]]) -> str:
        """A file with these; answers its path."""
        path = self._tmp_path / "capabilities.yaml"
        path.write_text(yaml.safe_dump({"capabilities": capabilities}), encoding="utf-8")
        return str(path)

    def _holding(self) -> str:
        run_id: str = self._client.run("hold", gate=str(self._gate))["run_id"]
        self._gate.entered()
        return run_id

    def _halted(self, client: Any, **halt: Any) -> None:
        answer = client.post("/v1/halts", json=halt)
        assert answer.status_code == 201
        self._cleanup.callback(client.delete, f"/v1/halts/{answer.json()['halt_id']}")

    @staticmethod
    def _decide(
        client: Any, approver: Any, run_id: str, word: str, comment: str = "", then: tuple[str, ...] = ()
    ) -> None:
        client.wait(run_id, "approval_requested")
        tickets = client.get("/v1/approvals", params={"state": "pending", "limit": 200}).json()["items"]
        ticket = next(each["ticket_id"] for each in tickets if each["run_id"] == run_id)
        body = {"decision": word, "comment": comment}
        assert approver.post(f"/v1/approvals/{ticket}/decision", json=body).status_code == 200
        client.wait(run_id, *then)


@pytest.fixture
def cases(
    platform: Any,
    client: Any,
    approver: Any,
    gate: Any,
    cleanup: ExitStack,
    own_server: Any,
    launch: Any,
    altered_policy: Any,
    tmp_path: Path,
) -> Cases:
    return Cases(
        _platform=platform,
        _client=client,
        _approver=approver,
        _gate=gate,
        _cleanup=cleanup,
        _own_server=own_server,
        _launch=launch,
        _altered_policy=altered_policy,
        _tmp_path=tmp_path,
    )


def test_no_run_is_lost_and_each_says_what_became_of_it(row: Any, cases: Cases, left: Any) -> None:
    left(row, *getattr(cases, row.method)())


def test_after_all_of_them_the_books_are_consistent(platform: Any, consistent: Any) -> None:
    consistent(platform)


def test_every_row_has_its_scenario(unasked: set[str]) -> None:
    assert unasked == set()
