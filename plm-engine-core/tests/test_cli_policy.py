"""`plm-cli policy`: lint, explain, test, diff, schema and replay, and how each ends."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plm_engine_core.cli import build_app
from plm_engine_core.cli.policy import policy_schema
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import Evaluation, Facts, PolicySnapshot, decide, load_policy
from plm_engine_core.control_plane.policy.lint import Severity, lint, require_known_names
from plm_engine_core.control_plane.policy.replay import UNDECIDED, Attempt, Replay
from plm_engine_core.control_plane.registry import CostBound, load_capabilities
from plm_engine_core.control_plane.vocabulary import EvaluationStatus
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
POLICY: dict[str, Any] = {
    "version": "1",
    "tier_by_mode": {"read": "auto_approve", "plan-write": "auto_approve", "execute-write": "always_approve"},
    "risk_by_mode": {"read": "low", "plan-write": "low", "execute-write": "high"},
    "budgets": {"run": {"EUR": 1, "calls": 1}, "tenant": {"EUR": 1, "calls": 1}},
    "max_eur_per_call": "2",
    "rules": [
        {
            "id": "big",
            "capabilities": ["thing.read"],
            "when": {"type": "field", "path": "arguments.amount", "operator": "gt", "value": 100},
            "then": "ask",
        }
    ],
}
CAPABILITIES = {
    "capabilities": [
        {"id": "thing.read", "description": "look", "mode": "read", "plugin": "things", "required_scopes": ["things"]},
        {"id": "thing.write", "description": "x", "mode": "execute-write", "plugin": "things", "certified": True},
    ]
}


class Files:
    """Files of one test, and commands over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.capabilities = self.write("capabilities", CAPABILITIES)

    def write(self, name: str, document: Any) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return str(path)

    def policy(self, name: str = "policy", **changes: Any) -> str:
        return self.write(name, {**POLICY, **changes})

    def run(self, *arguments: str, **environment: str) -> Any:
        environment = {"PLM_CAPABILITIES": self.capabilities, **environment}
        return CliRunner().invoke(build_app(), ["policy", *arguments], env=environment)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


# --- lint ------------------------------------------------------------------------------------------------------------


def rule(name, then="ask", **more):
    return {"id": name, "then": then, **({"guidance": "x"} if then == "steer" else {}), **more}


CONDITION = {"type": "field", "path": "arguments.a", "operator": "exists"}


@pytest.mark.parametrize(
    ("changes", "check", "at", "severity"),
    [
        ({"tiers": {"blocked": ["thing.raed"]}}, "unknown-capability", "tiers.thing.raed", "error"),
        ({"risk_by_capability": {"a.b": "low"}}, "unknown-capability", "risk_by_capability.a.b", "error"),
        ({"rules": [rule("r", capabilities=["thing.w?"])]}, "matches-nothing", "rules.r", "error"),
        ({"rules": [rule("a", when=CONDITION), rule("b", when=CONDITION)]}, "doubled", "rules.b", "warning"),
        ({"rules": [rule("a", "deny"), rule("b", when=CONDITION)]}, "unreachable", "rules.b", "warning"),
        ({"rules": [rule("a", when=CONDITION), rule("b", "steer")]}, "unreachable", "rules.a", "warning"),
        (
            {"tiers": {"blocked": ["thing.read"]}, "rules": [rule("a", capabilities=["thing.read"])]},
            "unreachable",
            "rules.a",
            "warning",
        ),
        ({"guidance": {"thing.read": "x"}}, "idle", "guidance.thing.read", "warning"),
        (
            {"evaluators": [{"name": "e", "kind": "list", "gate": False, "config": {"blocklist": ["x"]}}]},
            "idle",
            "evaluators.e",
            "warning",
        ),
        (
            {"tiers": {"unrestricted": ["thing.write"]}, "autonomy_ceiling": "L3"},
            "write-without-human",
            "tiers.thing.write",
            "warning",
        ),
        *(
            ({"auto_approve_when": {"type": "time_of_day", **when}}, "never-holds", "auto_approve_when", "error")
            for when in ({"start": "00:00", "end": "00:00"}, {"start": "24:00", "end": "00:00"}, {"weekdays": []})
        ),
        ({"autonomy_ceiling": "L1"}, "never-runs", "autonomy_ceiling", "warning"),
        ({"max_eur_per_call": None}, "no-cost-bound", "max_eur_per_call", "warning"),
    ],
)
def test_lint_names_what_is_probably_not_meant(files, changes, check, at, severity):
    result = files.run("lint", files.policy(**{"rules": [], **changes}), "--json")
    remarks = json.loads(result.stdout)["remarks"]
    assert {"check": check, "at": at, "severity": severity}.items() <= next(r for r in remarks if r["at"] == at).items()
    assert result.exit_code == (1 if severity == "error" else 0)
    assert files.run("lint", files.policy(**{"rules": [], **changes}), "--strict").exit_code == 1


WRITTEN = """version: "1"
tier_by_mode: {read: auto_approve, plan-write: auto_approve, execute-write: always_approve}
risk_by_mode: {read: low, plan-write: low, execute-write: high}
budgets: {run: {EUR: 1, calls: 1}, tenant: {EUR: 1, calls: 1}}
max_eur_per_call: 2
risk_by_capability:
  thing.raed: low
tiers:
  steer: [thing.read]
  blocked:
    - thing.write
    - thing.wirte
guidance: {thing.read: look elsewhere}
rules:
  - id: nights.only
    capabilities: ["thing.*"]
    then: ask
    when: {type: time_of_day, weekdays: []}
  - then: deny
    id: none
    capabilities: ["no.*"]
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_each_remark_leads_to_line_and_column_of_its_entry(files, as_json):
    file = files.folder / ("policy.json" if as_json else "policy.yaml")
    document = yaml.safe_load(WRITTEN)
    file.write_text(json.dumps(document, indent=1) if as_json else WRITTEN, encoding="utf-8")
    said = files.run("lint", str(file), "--json")
    lines = file.read_text(encoding="utf-8").splitlines()
    there = {}
    for remark in json.loads(said.stdout)["remarks"]:
        path, line, column = remark["place"].rsplit(":", 2)
        assert path == str(file)
        there[remark["at"]] = lines[int(line) - 1][int(column) - 1 :]
        assert f"{remark['severity']}: {remark['place']}: {remark['at']}: " in files.run("lint", str(file)).stdout
    assert {at: text.replace('"', "").rstrip(",") for at, text in there.items() if at != "rules.none"} == {
        "risk_by_capability.thing.raed": "thing.raed: low",
        "tiers.thing.wirte": "thing.wirte",
        "rules.nights.only.when": "when: {" if as_json else "when: {type: time_of_day, weekdays: []}",
    }
    assert there["rules.none"] == ("{" if as_json else "then: deny")
    with pytest.raises(InvalidRequest, match=rf"^{re.escape(str(file))}:\d+:\d+: tiers\.thing\.wirte: "):
        require_known_names(load_policy(file), load_capabilities(Path(files.capabilities)), source=file)


def test_lint_has_nothing_to_say_of_a_sound_policy(files):
    result = files.run("lint", files.policy())
    assert (result.exit_code, result.stdout) == (0, "nothing to remark\n")


def test_a_price_without_a_bound_is_remarked(files):
    priced = {**CAPABILITIES["capabilities"][0], "cost": {"eur_per_unit": {"page": "0.01"}}}
    files.write("capabilities", {"capabilities": [priced]})
    said = files.run("lint", files.policy()).stdout
    assert f"warning: {files.capabilities}:2:3: capabilities.thing.read.cost: " in said


def test_the_policy_of_the_demo_has_no_errors():
    remarks = lint(load_policy(ROOT / "dev" / "policy.yaml"), load_capabilities(ROOT / "dev" / "capabilities.yaml"))
    assert [each for each in remarks if each.severity is Severity.ERROR] == []


@pytest.mark.parametrize("command", ["lint", "explain", "test", "diff"])
def test_a_policy_that_cannot_be_read_ends_with_its_place(files, command):
    bad = files.policy("bad", grant_seconds=-1)
    more = [bad] if command == "diff" else [files.write("other", {})] if command != "lint" else []
    result = files.run(command, bad, *more)
    assert result.exit_code == 1
    assert f"{bad}:" in result.stderr
    assert "grant_seconds" in result.stderr
    told = json.loads(files.run(command, bad, *more, "--json").stdout)
    assert (told["refused"], told["reason"]) == ("invalid_request", "invalid_request")
    assert f"{bad}:" in told["message"]


# --- explain, test, diff ---------------------------------------------------------------------------------------------


def test_explain_names_the_rule_its_leaves_and_what_would_unblock_it(files):
    proposal = files.write("proposal", {"capability": "thing.read", "arguments": {"amount": 101}})
    result = files.run("explain", files.policy(), proposal)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "ask: thing.read needs the approval of a human (rule big)"
    assert "  rule: rules.big" in result.stdout
    assert "  rules.big.when: arguments.amount gt 100: holds" in result.stdout
    assert "  unblocked by approval by a person with plm.hitl.resolve within 3600 s" in result.stdout
    answer = json.loads(files.run("explain", files.policy(), proposal, "--json").stdout)
    assert (answer["outcome"], answer["rule"]) == ("ask", "rules.big")


def test_explain_names_what_raised_the_risk(files):
    proposal = files.write("proposal", {"capability": "thing.read", "claims": {"risk": "high"}, "run": {"points": 9}})
    result = files.run("explain", files.policy(run_risk={"raises": {"medium": 10}}), proposal)
    assert "  risk: high\n  risk raised by claims.risk\n  risk raised by run_risk.raises.medium\n" in result.stdout


def test_explain_asks_the_evaluators_unless_the_proposal_says_what_they_answer(files):
    gate = {"name": "short", "kind": "list", "config": {"field": "arguments.name", "allowlist": ["a"]}}
    policy = files.policy(evaluators=[gate], rules=[])
    for proposal, outcome in (
        ({"arguments": {"name": "a"}}, "allow"),
        ({"arguments": {"name": "b"}}, "deny"),
        ({"arguments": {"name": "b"}, "evaluations": {"short": "allowed"}}, "allow"),
        ({"arguments": {"name": "a"}, "evaluations": {"short": "timed_out"}}, "deny"),
    ):
        written = files.write("proposal", {"capability": "thing.read", **proposal})
        assert json.loads(files.run("explain", policy, written, "--json").stdout)["outcome"] == outcome


CASES = {
    "cases": [
        {
            "name": "a big one asks",
            "given": {"capability": "thing.read", "arguments": {"amount": 101}},
            "expect": {"risk": "low", "rule": "rules.big", "outcome": "ask"},
        },
        {
            "name": "without its scope nothing is read",
            "given": {"capability": "thing.read", "scopes": []},
            "expect": {"outcome": "deny", "reason": "missing_scopes"},
        },
        {
            "name": "what is not registered is refused",
            "given": {"capability": "thing.gone"},
            "expect": {"outcome": "deny", "reason": "capability_unknown"},
        },
    ]
}


def test_cases_that_are_decided_as_expected_end_with_0_and_others_are_named(files):
    cases = files.write("cases", CASES)
    result = files.run("test", files.policy(), cases)
    assert (result.exit_code, result.stdout) == (0, "3 of 3 cases as expected\n")
    result = files.run("test", files.policy(rules=[]), cases)
    assert result.exit_code == 1
    assert "a big one asks: outcome is allow, expected ask" in result.stdout
    failed = json.loads(files.run("test", files.policy(rules=[]), cases, "--json").stdout)["failed"]
    assert [each["member"] for each in failed] == ["outcome", "rule"], "in the order of the form"
    assert failed[1] == {
        "case": "a big one asks",
        "member": "rule",
        "expected": "rules.big",
        "decided": "tier_by_mode.read",
    }


def test_two_cases_of_one_name_are_refused_as_one_would_hide_the_other(files):
    twice = {"cases": [CASES["cases"][0], {**CASES["cases"][1], "name": "a big one asks"}]}
    for arguments in (["test", files.policy()], ["diff", files.policy(), files.policy(), "--cases"]):
        result = files.run(*arguments, files.write("cases", twice))
        assert result.exit_code == 1
        assert "two cases are named 'a big one asks'" in result.stderr


def test_an_answer_of_an_evaluator_that_is_not_declared_is_refused_and_not_left_out(files):
    gate = {"name": "short", "kind": "list", "config": {"blocklist": ["a"]}}
    policy, none = files.policy(evaluators=[gate], rules=[]), files.policy("none", rules=[])
    given = {"capability": "thing.read", "evaluations": {"shrt": "denied"}}
    proposal = files.write("proposal", given)
    cases = files.write("cases", {"cases": [{"name": "one", "given": given, "expect": {"outcome": "deny"}}]})
    for arguments in (["explain", policy, proposal], ["test", policy, cases], ["diff", none, policy, "--cases", cases]):
        result = files.run(*arguments)
        assert result.exit_code == 1
        assert "evaluations.shrt: the policy declares no such evaluator; there are short" in result.stderr
    assert "it declares none" in files.run("explain", none, proposal).stderr
    given["evaluations"] = {"short": "allowed"}
    known = files.write("cases", {"cases": [{"name": "one", "given": given, "expect": {"outcome": "allow"}}]})
    told = json.loads(files.run("diff", none, policy, "--cases", known, "--json").stdout)
    assert told["changed"] == [], "one of the two declares it"


def test_diff_names_the_capabilities_and_cases_that_are_decided_differently(files):
    old, cases = files.policy("old", rules=[]), files.write("cases", CASES)
    assert files.run("diff", old, files.policy("same", version="2", rules=[])).stdout == "no difference\n"
    new = files.policy("new", tiers={"blocked": ["thing.write"]})
    result = files.run("diff", old, new, "--cases", cases, "--json")
    assert result.exit_code == 1
    changed = {
        each["what"]: (each["old"]["outcome"], each["new"]["outcome"]) for each in json.loads(result.stdout)["changed"]
    }
    assert changed == {
        "capability thing.read": ("allow", "ask"),
        "capability thing.write": ("ask", "deny"),
        "case a big one asks": ("allow", "ask"),
    }


ONE, TWO = {"id": "one", "then": "ask"}, {"id": "two", "then": "deny", "capabilities": ["thing.write"]}
SHORT: dict[str, Any] = {"name": "short", "kind": "list", "config": {"blocklist": ["a"]}}
TENANT = {"EUR": "1", "calls": "1"}


@pytest.mark.parametrize(
    ("old", "new", "at", "values"),
    [
        ({}, {"approval": {"quorum": 3}}, "approval.quorum", [1, 3]),
        ({}, {"budgets": {"run": TENANT, "tenant": {**TENANT, "EUR": "9"}}}, "budgets.tenant.EUR", ["1", "9"]),
        ({}, {"rate_limit": {"per_second": 900}}, "rate_limit.per_second", [30, 900]),
        ({}, {"units": ["mails"]}, "units", [[], ["mails"]]),
        ({"rules": [TWO]}, {"rules": [{**TWO, "then": "ask"}]}, "rules.two.then", ["deny", "ask"]),
        ({"rules": [ONE, TWO]}, {"rules": [TWO, ONE]}, "rules, in their order", [["one", "two"], ["two", "one"]]),
        (
            {"evaluators": [SHORT]},
            {"evaluators": [{**SHORT, "config": {"blocklist": ["a", "b"]}}]},
            "evaluators.short.config.blocklist",
            [["a"], ["a", "b"]],
        ),
    ],
    ids=["quorum", "budget", "rate", "unit", "rule", "order", "evaluator"],
)
def test_diff_names_every_entry_that_differs_whatever_decisions_show(files, old, new, at, values):
    arguments = ["diff", files.policy("old", **old), files.policy("new", **new)]
    result = files.run(*arguments, "--json")
    assert result.exit_code == 1
    assert [[each["old"], each["new"]] for each in json.loads(result.stdout)["entries"] if each["at"] == at] == [values]
    assert f"  {at}: " in files.run(*arguments).stdout


@pytest.mark.parametrize(
    ("evaluator", "place"),
    [
        ("{name: b, kind: nope}", ":2:3: evaluators.b: no evaluator of kind nope"),
        ("{name: b, kind: list}", ":2:3: evaluators.b.config: give an allowlist"),
        ("{name: b, kind: regex, config: {patterns: [x, '(y']}}", ":2:26: evaluators.b.config"),
        ("{name: b, kind: regex, config: {patterns: [x], field: thing}}", ":2:50: evaluators.b.config.field"),
        ("{name: b, kind: json_schema, config: {schema: {type: strng}}}", ":2:32: evaluators.b.config"),
    ],
    ids=["kind", "list", "pattern", "field", "schema"],
)
def test_an_evaluator_that_cannot_work_is_named_with_its_line_and_column(files, evaluator, place):
    good = "{name: a.1, kind: list, config: {blocklist: [x]}}"
    rest = yaml.safe_dump({**POLICY, "rules": []})
    path = files.folder / "policy.yaml"
    path.write_text(f"evaluators: [{good},\n  {evaluator}]\n{rest}", encoding="utf-8")
    result = files.run("lint", str(path))
    assert result.exit_code == 1
    assert f"{path}{place}" in result.stderr


# --- schema ----------------------------------------------------------------------------------------------------------


def test_the_published_schema_is_current(files):
    published = (ROOT / "docs" / "policy.schema.json").read_text(encoding="utf-8")
    assert published == policy_schema() + "\n", "write it anew: plm-cli policy schema > docs/policy.schema.json"
    assert files.run("schema").stdout == published


def test_the_schema_takes_what_is_read_and_refuses_what_is_unknown():
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(policy_schema()))
    validator.check_schema(validator.schema)
    assert validator.is_valid(POLICY)
    assert validator.is_valid({**POLICY, "tiers": {"blocked": ["a.b"]}})
    assert validator.is_valid({**POLICY, "tiers": {"a.b": "blocked"}})
    assert validator.is_valid(yaml.safe_load((ROOT / "dev" / "policy.yaml").read_text(encoding="utf-8")))
    assert not validator.is_valid({**POLICY, "tiers": {"a.b": "blocke"}})
    assert not validator.is_valid({**POLICY, "surprise": 1})
    assert not validator.is_valid({**POLICY, "rules": [{"id": "r"}]})


# --- replay ----------------------------------------------------------------------------------------------------------


def recorded(policy, facts, **changes):
    attempt = Attempt(
        run_id="r", step_index=0, attempt=1, capability="thing.use", resource="", arguments={}, decision={}
    )
    attempt = replace(attempt, **changes)
    decision = decide(attempt, policy, facts)
    return replace(attempt, decision={**decision.to_json(), "facts": facts.to_json()})


def stored_facts(**changes):
    line = (Path(__file__).parent / "data" / "recorded_decisions.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return replace(Facts.from_json(json.loads(line)["facts"]), **changes)


@given(st.lists(st.integers(0, 200), max_size=8))
@settings(max_examples=25)
def test_replayed_under_the_policy_it_was_recorded_with_nothing_changes(amounts):
    policy = PolicySnapshot.model_validate({**POLICY, "rules": [{**POLICY["rules"][0], "capabilities": ["*"]}]})
    report = Replay(policy=policy)
    report.feed(recorded(policy, stored_facts(), arguments={"amount": amount}) for amount in amounts)
    assert (report.attempts, report.changed) == (len(amounts), 0)
    assert report.terms == {}
    assert all(each.before == each.after for each in report.costs.reserved.values())


def test_a_replay_counts_what_would_change_and_what_it_would_reserve():
    old = PolicySnapshot.model_validate({**POLICY, "rules": []})
    new = PolicySnapshot.model_validate(
        {**POLICY, "rules": [{**POLICY["rules"][0], "capabilities": ["*"], "then": "deny"}]}
    )
    report = Replay(policy=new)
    report.feed(recorded(old, stored_facts(), arguments={"amount": amount}) for amount in (1, 101, 102))
    answer = json.loads(json.dumps(report.to_json()))
    assert answer["outcomes"] == [
        {"before": "allow", "after": "allow", "attempts": 1},
        {"before": "allow", "after": "deny", "attempts": 2},
    ]
    assert answer["reserved"] == {
        "EUR": {"before": "0.75", "after": "0.25"},
        "calls": {"before": "3", "after": "1"},
    }
    assert answer["examples"][0]["rule"] == "rules.big"


def test_what_turns_on_an_evaluator_that_nobody_asked_is_undecided():
    old = PolicySnapshot.model_validate({**POLICY, "rules": []})
    gate = {"name": "gate", "kind": "list", "config": {"blocklist": ["x"]}}
    gated = PolicySnapshot.model_validate({**POLICY, "rules": [], "evaluators": [gate]})
    report = Replay(policy=gated)
    report.feed([recorded(old, stored_facts()), recorded(old, stored_facts(evaluations=()))])
    assert report.outcomes == {("allow", UNDECIDED): 2}


def test_a_replay_tells_what_would_be_reserved_in_every_unit():
    cost = {"max_eur": "0.10", "max_usage": {"tokens": 4000, "emails": "0.5"}}
    facts = stored_facts()
    facts = replace(facts, capability=facts.capability.model_copy(update={"cost": CostBound.model_validate(cost)}))
    asking = {**POLICY, "rules": [{"id": "all", "then": "ask"}]}
    denying = {**POLICY, "rules": [{**POLICY["rules"][0], "capabilities": ["*"], "then": "deny"}]}
    report = Replay(policy=PolicySnapshot.model_validate(denying))
    old = PolicySnapshot.model_validate(asking)
    report.feed(recorded(old, facts, arguments={"amount": amount}) for amount in (1, 2, 101))
    assert report.to_json()["reserved"] == {
        "EUR": {"before": "0.3", "after": "0.2"},
        "calls": {"before": "3", "after": "2"},
        "emails": {"before": "1.5", "after": "1"},
        "tokens": {"before": "12000", "after": "8000"},
    }
    assert Replay(policy=old).to_json()["reserved"]["calls"] == {"before": "0", "after": "0"}


def test_what_is_undecided_may_be_allowed_and_is_in_what_would_be_reserved():
    gate = {"name": "gate", "kind": "list", "config": {"blocklist": ["x"]}}
    report = Replay(policy=PolicySnapshot.model_validate({**POLICY, "rules": [], "evaluators": [gate]}))
    report.feed([recorded(PolicySnapshot.model_validate({**POLICY, "rules": []}), stored_facts())])
    assert report.to_json()["reserved"]["EUR"] == {"before": "0.25", "after": "0.25"}


DAMAGES = {
    "no facts": lambda decision: decision.pop("facts"),
    "no outcome": lambda decision: decision.pop("outcome"),
    "another capability's form": lambda decision: decision["facts"]["capability"].update(mode="x"),
    "an evaluation of no kind": lambda decision: decision["facts"].update(evaluations=[{"name": "a", "status": "x"}]),
    "no time": lambda decision: decision["facts"].update(at="x"),
    "no amount": lambda decision: decision.update(reserve={"EUR": "x"}),
    "no amounts": lambda decision: decision.update(reserve=["EUR"]),
    "nothing": lambda decision: decision.clear(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_record_is_counted_and_keeps_no_other_from_being_replayed(damage):
    policy = PolicySnapshot.model_validate({**POLICY, "rules": []})
    good = recorded(policy, stored_facts())
    decision = json.loads(json.dumps(good.decision))
    damage(decision)
    report = Replay(policy=policy)
    report.feed([replace(good, decision=decision), good])
    answer = report.to_json()
    assert (answer["attempts"], answer["changed"]) == (2, 1)
    assert [each["attempts"] for each in answer["outcomes"] if each["after"] == "unreadable"] == [1]
    assert answer["examples"][0]["after"] == "unreadable"
    assert answer["reserved"]["calls"] == {"before": "1", "after": "1"}


async def test_a_database_that_was_not_prepared_is_a_refusal_with_the_way_to_prepare_it(bench, files):
    empty = urlsplit(bench.database.app)._replace(path="/postgres").geturl()
    for arguments in (["replay", files.policy(), "--tenant-id", str(bench.tenant)], ["active"]):
        result = await asyncio.to_thread(files.run, *arguments, "--json", PG_DSN=empty)
        assert result.exit_code == 1
        assert json.loads(result.stdout)["reason"] == "storage_unavailable"
        assert "plm-cli db upgrade" in result.stderr


async def test_recorded_proposals_are_replayed_from_the_database(bench, files):
    lease = await bench.lease()
    for index, amount in enumerate((1, 500)):
        await bench.grant(lease, step_index=index, arguments={"amount": amount})
    seen = [batch async for batch in bench.storage.runs.attempts(bench.tenant, since=lease.run.created_at)]
    assert [(each.step_index, each.arguments) for batch in seen for each in batch] == [
        (0, {"amount": 1}),
        (1, {"amount": 500}),
    ]
    result = await asyncio.to_thread(
        files.run, "replay", files.policy(), "--tenant-id", str(bench.tenant), "--json", PG_DSN=bench.database.app
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["attempts"], answer["changed"]) == (2, 1)
    assert answer["examples"][0]["rule"] == "rules.big"
    none = await asyncio.to_thread(
        files.run, "replay", files.policy(), "--tenant-id", str(bench.tenant), "--days", "0", "--json",
        PG_DSN=bench.database.app,
    )  # fmt: skip
    assert json.loads(none.stdout)["attempts"] == 0
    text = await asyncio.to_thread(
        files.run, "replay", files.policy(), "--tenant-id", str(bench.tenant), PG_DSN=bench.database.app
    )
    assert "2 recorded proposals, 1 decided otherwise\n  1 x thing.read: allow -> ask" in text.stdout
    assert "would reserve\n  1 EUR instead of 1\n  2 calls instead of 2\n" in text.stdout
    assert "never made\n  0 EUR, 0; at most 0.5\n  0 calls, 0; at most 1\n" in text.stdout


def test_what_calls_spent_stays_with_those_that_would_still_be_made_and_bounds_stand_for_those_that_never_were():
    old = PolicySnapshot.model_validate(
        {**POLICY, "rules": [{**POLICY["rules"][0], "capabilities": ["*"], "then": "deny"}]}
    )
    small = {"type": "field", "path": "arguments.amount", "operator": "le", "value": 1}
    new = PolicySnapshot.model_validate({**POLICY, "rules": [{"id": "small", "when": small, "then": "deny"}]})
    facts, cost = stored_facts(), {"EUR": "0.01", "calls": "1", "tokens": "12"}
    calls = [
        recorded(old, facts, arguments={"amount": 1}, spent=cost),
        recorded(old, facts, arguments={"amount": 2}, spent={**cost, "EUR": "0.02"}),
        recorded(old, facts, arguments={"amount": 101}),  # denied then, and allowed now: its bound is 0.25 EUR
        recorded(old, facts, arguments={"amount": 3}),  # allowed both times, and never made
    ]
    same, other = Replay(policy=old), Replay(policy=new)
    same.feed(calls)
    other.feed(calls)
    assert same.to_json()["spent"]["EUR"] == {"before": "0.03", "after": "0.03", "at_most": "0.03"}
    assert other.to_json()["spent"] == {
        "EUR": {"before": "0.03", "after": "0.02", "at_most": "0.27"},
        "calls": {"before": "2", "after": "1", "at_most": "2"},
        "tokens": {"before": "24", "after": "12", "at_most": "12"},
    }


def test_what_is_asked_of_more_people_is_counted_by_what_an_approval_needs():
    asking = {**POLICY, "rules": [{"id": "all", "then": "ask"}]}
    old, new = (PolicySnapshot.model_validate({**asking, "approval": {"quorum": quorum}}) for quorum in (1, 2))
    report = Replay(policy=new)
    report.feed([recorded(old, stored_facts())] * 3)
    answer = report.to_json()
    assert (answer["changed"], answer["on_other_terms"]) == (0, 3)
    (terms,) = answer["terms"]
    assert terms["attempts"] == 3
    assert terms["before"].startswith("approval by a person with")
    assert terms["after"].startswith("approval by 2 people with")


@pytest.mark.every_storage
async def test_what_settled_calls_spent_is_read_with_them(bench):
    lease = await bench.lease()
    made = await bench.begun(lease)
    settled = await bench.settle(made, lease, usage={"thing": Decimal(3)})
    await bench.begun(lease, step_index=1)
    seen = [batch async for batch in bench.storage.runs.attempts(bench.tenant, since=lease.run.created_at)]
    first, second = [each for batch in seen for each in batch]
    assert first.spent == settled.spent == {"EUR": "0.03", "calls": "1"}
    assert second.spent is None


async def test_a_tenant_or_shadow_that_does_not_exist_is_no_good_news(bench, files):
    nobody = str(uuid.uuid4())
    for arguments, missing in (
        (["replay", files.policy(), "--tenant-id", nobody], f"tenant {nobody} does not exist"),
        (["shadow", "report", "--digest", "abc", "--tenant-id", nobody], f"tenant {nobody} does not exist"),
        (["shadow", "report", "--digest", "abc", "--tenant-id", str(bench.tenant)], "policy abc does not exist"),
    ):
        result = await asyncio.to_thread(files.run, *arguments, PG_DSN=bench.database.app)
        assert (result.exit_code, result.stdout) == (1, "")
        assert missing in result.stderr


@pytest.mark.parametrize("days", ["1e6", "1e9", "inf", "nan", "-1"])
def test_days_that_no_calendar_has_are_wrong_arguments(files, days):
    for command in (["replay", files.policy()], ["shadow", "report"]):
        result = files.run(*command, "--tenant-id", str(uuid.UUID(int=1)), "--days", days)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "--days" in result.stderr


SECRET = "AKIAEXAMPLE0000000000"  # nobody's
NO_KEYS = {"kind": "regex", "config": {"patterns": ["AKIA[A-Z0-9]{16}"]}}
OUTPUT_GATE = {"name": "out", "phase": "output", "capabilities": ["thing.read"], **NO_KEYS}
INPUT_GATE = {"name": "given", "phase": "input", **NO_KEYS}
OF_READ = {"phase": "output", "capability": "thing.read"}
EXPLAINED = {
    "denied in": ({"phase": "input", "input": {"a": SECRET}}, "deny", "evaluators.given"),
    "allowed in": ({"phase": "input", "agent": "x", "input": {"a": 1}}, "allow", None),
    "denied out": ({**OF_READ, "output": SECRET}, "deny", "evaluators.out"),
    "an error": ({**OF_READ, "error": {"message": SECRET}}, "deny", "evaluators.out"),
    "not about it": ({"phase": "output", "capability": "thing.write", "output": SECRET}, "allow", None),
    "said": ({**OF_READ, "evaluations": {"out": "timed_out"}}, "deny", "evaluators.out"),
    "not registered": ({"phase": "output", "capability": "thing.gone", "output": 1}, "deny", "capabilities"),
}


class TestPhases:
    """The evaluators of the phases input and output, as the commands see them."""

    @pytest.mark.parametrize(("proposal", "outcome", "rule"), EXPLAINED.values(), ids=EXPLAINED)
    def test_explain_says_what_they_let_a_run_be_given_and_a_call_give_back(self, files, proposal, outcome, rule):
        policy = files.policy(evaluators=[INPUT_GATE, OUTPUT_GATE], rules=[])
        said = files.run("explain", policy, files.write("proposal", proposal), "--json").stdout
        told = json.loads(said)
        assert (told["outcome"], told.get("rule")) == (outcome, rule)
        assert SECRET not in said

    @pytest.mark.parametrize(
        ("proposal", "words"),
        [
            ({"phase": "input", "capability": "thing.read"}, "capability says nothing in the phase input"),
            ({"phase": "output", "output": 1}, "in the phase output it needs a capability"),
            ({"output": 1, "capability": "thing.read"}, "output says nothing in the phase call"),
            ({}, "in the phase call it needs a capability"),
            ({**OF_READ, "output": 1, "error": {}}, "an output, or an error where it failed"),
        ],
    )
    def test_what_a_phase_has_not_is_refused(self, files, proposal, words):
        policy = files.policy(evaluators=[INPUT_GATE, OUTPUT_GATE], rules=[])
        result = files.run("explain", policy, files.write("proposal", proposal))
        assert result.exit_code == 1
        assert words in result.stderr

    def test_cases_may_be_about_any_phase(self, files):
        policy = files.policy(evaluators=[INPUT_GATE, OUTPUT_GATE], rules=[])
        denied = {"outcome": "deny", "reason": "evaluator_denied"}
        cases = [
            {"name": "in", "given": {"phase": "input", "input": {"a": SECRET}}, "expect": denied},
            {"name": "out", "given": {**OF_READ, "output": [SECRET]}, "expect": {**denied, "rule": "evaluators.out"}},
            {"name": "call", "given": {"capability": "thing.read"}, "expect": {"outcome": "allow"}},
        ]
        result = files.run("test", policy, files.write("cases", {"cases": cases}))
        assert (result.exit_code, result.stdout.strip()) == (0, "3 of 3 cases as expected")

    def test_diff_names_those_that_differ(self, files):
        old = files.policy("old", evaluators=[INPUT_GATE, OUTPUT_GATE], rules=[])
        new = files.policy("new", evaluators=[{**OUTPUT_GATE, "timeout_ms": 5}], rules=[])
        result = files.run("diff", old, new, "--json")
        told = {each["what"]: each for each in json.loads(result.stdout)["changed"]}
        assert result.exit_code == 1
        assert sorted(told) == ["evaluator given", "evaluator out"]
        assert (told["evaluator given"]["old"]["phase"], told["evaluator given"]["new"]) == ("input", {})
        assert (told["evaluator out"]["old"]["timeout_ms"], told["evaluator out"]["new"]["timeout_ms"]) == (1000, 5)
        assert "evaluator given: input of * (regex" in files.run("diff", old, new).stdout
        assert files.run("diff", old, old).exit_code == 0

    def test_lint_knows_outputs_that_never_come(self, files):
        def remarks(**changes):
            said = files.run("lint", files.policy(rules=[], **changes), "--json").stdout
            return {(each["at"], each["check"]) for each in json.loads(said)["remarks"]}

        mine = ("evaluators.out", "idle")
        assert mine in remarks(evaluators=[OUTPUT_GATE], tiers={"thing.read": "blocked"})
        assert ("evaluators.out", "matches-nothing") in remarks(evaluators=[{**OUTPUT_GATE, "capabilities": ["no.*"]}])
        assert not [at for at, _ in remarks(evaluators=[INPUT_GATE, OUTPUT_GATE]) if at.startswith("evaluators")]

    def test_a_replay_names_them_and_they_leave_no_proposal_undecided(self):
        asks = {"type": "evaluator", "evaluator_name": "soft"}
        soft = {"name": "soft", "kind": "list", "gate": False, "config": {"blocklist": ["x"]}}
        rules = [{"id": "a", "when": asks, "then": "ask"}]
        of_calls = PolicySnapshot.model_validate({**POLICY, "rules": rules, "evaluators": [soft]})
        policy = PolicySnapshot.model_validate(
            {**POLICY, "rules": rules, "evaluators": [soft, INPUT_GATE, OUTPUT_GATE]}
        )
        late = stored_facts(evaluations=(Evaluation(name="soft", status=EvaluationStatus.TIMED_OUT),))
        report = Replay(policy=policy)
        report.feed([recorded(of_calls, late)])
        assert report.outcomes == {("ask", "ask"): 1}
        assert report.to_json()["not_asked"] == ["given", "out"]
        assert Replay(policy=of_calls).to_json()["not_asked"] == []
