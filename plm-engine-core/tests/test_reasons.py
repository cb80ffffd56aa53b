"""Every refusal says its documented reason, its rule, and what would unblock it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from plm_engine_core.control_plane import Denied, Pending, Steered
from plm_engine_core.control_plane.vocabulary import HaltScope, Reason, TicketDecision
from plm_engine_core.control_plane.why import UNBLOCKED_BY

pytestmark = pytest.mark.every_storage

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reasons.md").read_text(encoding="utf-8")
POOR = {"run": {"EUR": "0.1", "calls": "9"}, "tenant": {"EUR": "9", "calls": "9"}}


def test_the_page_has_each_reason_once_with_what_unblocks_it() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+\.) \| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert [reason for reason, _, _ in rows] == [reason.value for reason in Reason]
    assert {Reason(reason): unblocked for reason, _, unblocked in rows} == dict(UNBLOCKED_BY)


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
