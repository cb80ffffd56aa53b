"""Every refusal says its documented reason, its rule, and what would unblock it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plm_engine_core import control_plane
from plm_engine_core.control_plane import Denied, Pending, Steered, errors
from plm_engine_core.control_plane.vocabulary import HaltScope, Reason, TicketDecision
from plm_engine_core.control_plane.why import UNBLOCKED_BY
from plm_engine_core.testing.fault_table import CANNOT_BE, GOES_ON, read_fault_table

pytestmark = pytest.mark.every_storage

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reasons.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| ([^|]+\.) \| ([^|]+) \|$", re.MULTILINE)
ANSWERS, _, REQUESTS = PAGE.partition("## Requests that are refused")
POOR = {"run": {"EUR": "0.1", "calls": "9"}, "tenant": {"EUR": "9", "calls": "9"}}


def test_the_page_has_each_reason_once_with_what_unblocks_it() -> None:
    rows = ROW.findall(ANSWERS)
    assert [reason for reason, _, _ in rows] == [reason.value for reason in Reason]
    assert {Reason(reason): unblocked for reason, _, unblocked in rows} == dict(UNBLOCKED_BY)


def test_the_page_has_what_every_refused_request_is_told_and_nothing_else() -> None:
    told = {reason for reason, _, _ in ROW.findall(REQUESTS)}
    assert told == {*raised(), *answered_by_the_books()} - {reason.value for reason in Reason}


def test_what_is_answered_under_a_fault_is_one_of_them() -> None:
    said = {cell for row in read_fault_table(PAGE).values() for cell in row.values()}
    assert {cell for cell in said if cell != GOES_ON and not cell.startswith(CANNOT_BE)} <= {
        reason for reason, _, _ in ROW.findall(PAGE)
    }


def raised() -> Iterator[str]:
    """The reason of every typed refusal in the sources, or its code where it has no other."""
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.ControlPlaneError)
    }
    for name in kinds.keys() - {"ControlPlaneError", "Conflict", "Forbidden", "InputRefused"}:
        yield kinds[name].code
    for path in Path(control_plane.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds:
                words = [each.value for each in node.keywords if each.arg == "reason"]
                yield from (each.value for each in words if isinstance(each, ast.Constant))


def answered_by_the_books() -> Iterator[str]:
    for path in Path(control_plane.__file__).parent.glob("storage/sql/*.sql"):
        yield from re.findall(r"'reason', '(?!message)(\w+)'", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("reason", "policy", "proposal"),
    [
        (Reason.RATE_LIMIT_EXCEEDED, {"rate_limit": {"per_second": 0.001, "burst": 1}}, {}),
        (Reason.CAPABILITY_UNKNOWN, {}, {"capability": "thing.unknown"}),
        (Reason.MISSING_SCOPES, {}, {"principal": "stranger"}),
        (Reason.AUTONOMY_TOO_LOW, {"autonomy_ceiling": "L1"}, {"capability": "thing.write"}),
        (Reason.CAPABILITY_BLOCKED, {"tiers": {"thing.read": "blocked"}}, {}),
        (Reason.RULE_DENIED, {"rules": [{"id": "no", "then": "deny"}]}, {}),
        (Reason.BUDGET_EXCEEDED, {"budgets": POOR}, {}),
        (Reason.BUDGET_EXCEEDED, {"max_eur_per_call": "0.1"}, {}),
        (Reason.BUDGET_EXCEEDED, {"limits": [{"scope": "agent", "per": "day", "unit": "calls", "limit": 0}]}, {}),
    ],
    ids=lambda each: each.value if isinstance(each, Reason) else None,
)
async def test_a_refusal_names_its_rule_and_what_would_unblock_it(
    bench: Any, reason: Reason, policy: Any, proposal: Any
) -> None:
    bench = bench.with_policy(**policy)
    lease = await bench.lease()
    if proposal.get("principal"):
        who = bench.requester
        proposal = {"principal": type(who)(user_id=who.user_id, actor_kind="human", scopes=frozenset())}
    if reason is Reason.RATE_LIMIT_EXCEEDED:
        await bench.grant(lease, step_index=1, step_id="earlier")
    said_in_full(await bench.control_plane.admit(bench.proposal(lease, **proposal)), reason)


async def test_what_the_books_refuse_says_so_too(bench: Any) -> None:
    lease, pending = await bench.ask()
    await bench.decide(pending, TicketDecision.DENY)
    lease = await bench.lease(lease.run)
    again = bench.proposal(lease, capability="thing.write", ticket_id=pending.ticket_id)
    said_in_full(await bench.control_plane.admit(again), Reason.APPROVAL_DENIED)
    other = await bench.lease()
    mismatched = bench.proposal(other, capability="thing.write", ticket_id=pending.ticket_id)
    said_in_full(await bench.control_plane.admit(mismatched), Reason.APPROVAL_MISMATCH)
    third = await bench.lease()
    await bench.halt(HaltScope.TENANT)
    said_in_full(await bench.control_plane.admit(bench.proposal(third)), Reason.HALTED)


async def test_guidance_and_a_question_say_it_too_and_again_when_they_are_asked_for_again(bench: Any) -> None:
    bench = bench.with_policy(
        rules=[
            {"id": "aside", "capabilities": ["thing.read"], "then": "steer", "guidance": "read another"},
            {"id": "look", "capabilities": ["thing.write"], "then": "ask"},
        ]
    )
    for capability, kind, reason, rule in (
        ("thing.read", Steered, Reason.STEERED, "rules.aside"),
        ("thing.write", Pending, Reason.APPROVAL_REQUIRED, "rules.look"),
    ):
        lease = await bench.lease()
        answer = await bench.control_plane.admit(bench.proposal(lease, capability=capability))
        assert isinstance(answer, kind)
        assert (answer.reason, answer.rule) == (reason, rule)
        assert answer.unblock
        assert await bench.control_plane.admit(bench.proposal(lease, capability=capability)) == answer


def said_in_full(answer: Any, reason: Reason) -> None:
    assert isinstance(answer, Denied), answer
    assert answer.reason is reason
    assert answer.message
    assert answer.rule
    assert answer.unblock
