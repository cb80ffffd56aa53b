"""Killed at random for two minutes, five processes leave what one process leaves that does one run after another.

Compared are final states, effects, amounts spent, ledger rows and events, without what tells the two apart by design:
ids, times, fencing tokens, who held a run, and attempts that came to nothing. SOAK scales the two minutes.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

SOAK = float(os.environ.get("SOAK", "0.05"))
SECONDS = max(15.0, 120 * SOAK)
RUNS = max(30, min(60, round(120 * SOAK)))
AT_ONCE = 30
ENDED = ("succeeded", "failed", "cancelled")

# What is asked for, in turn: the agent, its budget, and what the approver says.
KINDS = (
    ("repeatable", {}, "approve"),
    ("unrepeatable", {}, "approve"),
    ("repeatable", {}, "deny"),
    ("failing", {}, ""),
    ("repeatable", {"calls": "1"}, ""),
)
HOLDERS = {"run_taken", "run_parked", "run_resumed", "step_reconciled"}


@dataclass(kw_only=True)
class Errand:
    """One run from its request to its end, seen to by a client that repeats what gets no answer."""

    cluster: Any
    journal: Any
    number: int
    seconds: float
    run_id: str = ""
    document: dict[str, Any] | None = None

    def advance(self) -> bool:
        """Do what can be done now; whether it has ended."""
        agent, budget, word = KINDS[self.number % len(KINDS)]
        if not self.run_id:
            inputs = {"journal": str(self.journal.folder), "seconds": self.seconds}
            self.run_id = self.cluster.create(agent, key=f"errand {self.number}", budget=budget, **inputs)
        document = self.cluster.run(self.run_id)
        if document["state"] == "awaiting_approval":
            self.cluster.decide(self.run_id, word)
        elif document["state"] == "outcome_unknown":
            self.cluster.reconcile(self.run_id, self.journal)
        elif document["state"] in ENDED:
            self.document = document
        return self.document is not None


@pytest.mark.timeout(420 + 4 * SECONDS)
def test_killed_at_random_they_leave_what_one_process_leaves(open_cluster: Callable[..., Any], journal: Any) -> None:
    with open_cluster("serve", PLM_RUN_CONCURRENCY="1") as cluster:
        serial = [Errand(cluster=cluster, journal=journal(f"serial{n}"), number=n, seconds=0) for n in range(RUNS)]
        for errand in serial:
            cluster.until(errand.advance, f"errand {errand.number} ends")
        expected = [_left_behind(cluster, errand) for errand in serial]
        expected_spend = _tenant_spend(cluster, serial)

    with open_cluster("api", "api", "worker", "worker", "worker") as cluster:
        errands = [Errand(cluster=cluster, journal=journal(f"struck{n}"), number=n, seconds=0.5) for n in range(RUNS)]
        kills = _under_fire(cluster, errands)
        assert kills >= SECONDS / 3, "there was some killing"
        for errand, wanted in zip(errands, expected, strict=True):
            assert _left_behind(cluster, errand) == wanted, f"{errand.run_id}:\n{cluster.story(errand.run_id)}"
        assert _tenant_spend(cluster, errands) == expected_spend
        cluster.consistent()
        held = "SELECT count(*) FROM budgets WHERE reserved <> 0"
        assert cluster.query(held) == [(0,)], "nothing stays reserved"


def _under_fire(cluster: Any, errands: list[Errand]) -> int:
    """See to the errands, spread over the time, while processes are killed; answers how many were."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201  # shown when the test fails
    dice, over, kills, started = random.Random(seed), threading.Event(), 0, time.monotonic()

    def fire() -> None:
        nonlocal kills
        while not over.wait(dice.uniform(0.2, 1.8)) and time.monotonic() - started < SECONDS:
            alive = [node for node in cluster.nodes if node.alive]
            if alive:
                dice.choice(alive).process.kill()
                kills += 1

    def mend() -> None:
        while not over.wait(0.05):
            cluster.repair()

    threads = [threading.Thread(target=each) for each in (fire, mend)]
    for thread in threads:
        thread.start()
    try:
        waiting, working = list(errands), list[Errand]()
        while waiting or working:
            share = (time.monotonic() - started) / SECONDS
            while waiting and len(working) < AT_ONCE and 1 - len(waiting) / RUNS <= share:
                working.append(waiting.pop(0))
            working = [errand for errand in working if not errand.advance()]
            assert share < 1 + 300 / SECONDS, [errand.run_id for errand in working]
        cluster.until(lambda: time.monotonic() - started > SECONDS, "the time is over")
    finally:
        over.set()
        for thread in threads:
            thread.join()
    cluster.repair()
    return kills


def _left_behind(cluster: Any, errand: Errand) -> dict[str, Any]:
    run = errand.document
    assert run is not None
    last = {step["step"]: step["attempt"] for step in run["steps"]}
    steps = [
        (step["step_id"], step["capability"], step["state"], (step["output"] or {}).get("label"))
        for step in run["steps"]
        if last[step["step"]] == step["attempt"]
    ]
    return {
        "state": run["state"],
        "reason": run["reason"],
        "result": (run["result"] or {}).get("label"),
        "steps": steps,
        "effects": errand.journal.effects(),
        "spent": _spent(cluster, errand),
        "ledger": _ledger(cluster, errand, last),
        "events": _events(cluster, errand, last),
    }


def _spent(cluster: Any, errand: Errand) -> dict[str, Decimal]:
    """Per unit, without what was charged for calls that somebody later said had not happened."""
    rows = cluster.query(
        "SELECT unit, spent, reserved FROM budgets WHERE scope_kind = 'run' AND scope_id = %s", errand.run_id
    )
    assert all(reserved == 0 for _, _, reserved in rows)
    disowned = _disowned(cluster, [errand])
    return {unit: spent - disowned.get(unit, Decimal(0)) for unit, spent, _ in rows}


def _tenant_spend(cluster: Any, errands: list[Errand]) -> dict[str, Decimal]:
    rows = cluster.query("SELECT unit, spent FROM budgets WHERE scope_kind = 'tenant'")
    disowned = _disowned(cluster, errands)
    return {unit: spent - disowned.get(unit, Decimal(0)) for unit, spent in rows}


def _disowned(cluster: Any, errands: list[Errand]) -> Counter[str]:
    rows = cluster.query(
        "SELECT r.unit, sum(COALESCE((g.charged ->> r.unit)::numeric, r.amount)) FROM grants AS g "
        "CROSS JOIN jsonb_to_recordset(g.reserved) AS r (scope_kind text, unit text, amount numeric) "
        "JOIN run_steps AS s ON s.tenant_id = g.tenant_id AND s.grant_id = g.id "
        "WHERE g.run_id = ANY(%s) AND g.outcome = 'outcome_unknown' AND s.state = 'not_started' "
        "AND r.scope_kind = 'run' GROUP BY r.unit",
        [errand.run_id for errand in errands],
    )
    return Counter(dict(rows))


def _ledger(cluster: Any, errand: Errand, last: dict[int, int]) -> Counter[Any]:
    """The rows of the attempts that counted; what somebody vouched for later stands there as unknown, at no cost."""
    rows = cluster.query(
        "SELECT t.event_type, t.capability, (t.payload ->> 'step')::int, (t.payload ->> 'attempt')::int, "
        "t.payload ->> 'status', c.cost_eur FROM telemetry_events AS t LEFT JOIN connector_calls AS c "
        "ON c.tenant_id = t.tenant_id AND c.span_id = t.span_id WHERE t.payload ->> 'run_id' = %s",
        errand.run_id,
    )
    return Counter(
        (event, capability, step, "succeeded" if status == "outcome_unknown" else status, cost or Decimal(0))
        for event, capability, step, attempt, status, cost in rows
        if last[step] == attempt
    )


def _events(cluster: Any, errand: Errand, last: dict[int, int]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for kind, text in cluster.query("SELECT kind, payload FROM events WHERE stream = %s", f"run/{errand.run_id}"):
        payload = json.loads(text)
        step, status = payload.get("step"), payload.get("status")
        if kind not in HOLDERS and (step is None or last[step] == payload["attempt"]):
            found[kind, step, "succeeded" if status == "outcome_unknown" else status] += 1
    return found
