"""Whatever is done, in whatever order: memory and PostgreSQL answer the same and write the same events, to the byte."""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from plm_engine_core.control_plane import Granted, InputRequest, Outcome, Pending
from plm_engine_core.control_plane.admission.ask import Failure
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.events import run_stream
from plm_engine_core.control_plane.hitl import ScopeTerms
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.storage.postgres import open_pool
from plm_engine_core.control_plane.vocabulary import (
    BudgetScope,
    Evidence,
    HaltScope,
    LockScope,
    OutcomeStatus,
    Period,
    RunState,
    TicketDecision,
)

SOAK = float(os.environ.get("SOAK", "0.05"))
RUNS, STEPS = 2, 2
PHASES = ("input", "output")
_FAILURE = Failure(step=0, attempt=1, reason="attempts_exhausted", message="nothing càme of it")
ENDS = [RunState.QUEUED, RunState.HALTED, RunState.SUCCEEDED, RunState.FAILED]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME = re.compile(
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?(\+00:00|\+00|Z)|datetime\.datetime\([^()]*(\([^()]*\))?\)"
)
_WAIT = re.compile(
    r"(?<=retry_after_ms=)[1-9]\d*|(?<=\"retry_after_ms\": )[1-9]\d*|(?<='retry_after_ms': )[1-9]\d*|\d+(?= ms\b)"
)
_AMOUNT = re.compile(r"Decimal\('([^']*)'\)")
_SPAN = re.compile(r"\b[0-9a-f]{16}\b")

numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
keys = st.text('aé\x7f"\\\n', max_size=3)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5
)
# A second policy, with every book that the first leaves out.
RICH = {
    "version": "rich",
    "limits": [
        {"scope": "agent", "per": "day", "unit": "calls", "limit": "3"},
        {"scope": "user", "unit": "EUR", "limit": "2"},
        {"scope": "run_group", "per": "week", "unit": "calls", "limit": "9"},
        {"scope": "tenant", "per": "month", "unit": "calls", "limit": "5"},
    ],
    "rate_limit_per_agent": {"per_second": 0.0001, "burst": 9},
    "approval": {
        "quorum": 2,
        "escalation": {"required_scope": "plm.halt"},
        "standing": {"max_uses": 3, "max_seconds": 600, "max_risk": "high"},
        "input": {"by_requester": False, "max_per_run": 3},
    },
}
# A third one, whose evaluators allow neither inputs nor outputs with an a or an x.
_NO_A = {"kind": "regex", "config": {"patterns": ["[ax]"]}}
STRICT = {"version": "strict", "evaluators": [{"name": f"no-a-{phase}", "phase": phase, **_NO_A} for phase in PHASES]}
BUDGETS = [(BudgetScope.AGENT, Period.DAY), (BudgetScope.TENANT, Period.TOTAL)]
run_at, step_at = st.integers(0, RUNS - 1), st.integers(0, STEPS - 1)
capabilities = st.sampled_from(["thing.read", "thing.write", "thing.fire", "thing.unknown"])
errors = st.none() | st.fixed_dictionaries({"category": st.just("x"), "message": leaves})

operations = st.one_of(
    st.tuples(
        st.just("create"), run_at, st.sampled_from([None, "k"]), st.sampled_from(["d", "e"]), values, st.booleans()
    ),
    st.tuples(st.just("take"), run_at),
    st.tuples(st.just("renew"), run_at),
    st.tuples(
        st.just("admit"),
        run_at,
        step_at,
        st.integers(1, 2),
        capabilities,
        values,
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    st.tuples(st.just("begin"), run_at),
    st.tuples(
        st.just("settle"),
        run_at,
        st.sampled_from(OutcomeStatus),
        values,
        errors,
        st.none() | st.integers(0, 900),
        st.booleans(),
    ),
    st.tuples(st.just("finish"), run_at, st.sampled_from(ENDS), values),
    st.tuples(
        st.just("decide"), run_at, st.sampled_from(TicketDecision), st.integers(0, 2), st.sampled_from(["", "no"])
    ),
    st.tuples(st.just("vote"), run_at, st.sampled_from(TicketDecision), st.integers(0, 2), st.booleans()),
    st.tuples(
        st.just("ask"), run_at, step_at, st.integers(1, 2), st.sampled_from("qr"), st.sampled_from([True, True, False])
    ),
    st.tuples(st.just("give"), run_at, values, st.integers(0, 2), st.sampled_from(["", "so"])),
    st.tuples(st.just("refuse_to_give"), run_at, st.integers(0, 2)),
    st.tuples(st.just("comment"), run_at, texts),
    st.tuples(st.just("revoke_scope")),
    st.tuples(st.just("cancel"), run_at),
    st.tuples(st.just("halt"), st.sampled_from([HaltScope.TENANT, HaltScope.RUN]), run_at),
    st.tuples(st.just("halt_by_name"), st.sampled_from([HaltScope.AGENT, HaltScope.CAPABILITY])),
    st.tuples(st.just("end_halted")),
    st.tuples(st.just("drill"), st.sampled_from([HaltScope.TENANT, HaltScope.AGENT, HaltScope.CAPABILITY])),
    st.tuples(st.just("set_budget"), st.sampled_from(BUDGETS), st.integers(0, 9)),
    st.tuples(st.just("correct_budget"), st.sampled_from(BUDGETS), st.integers(-2, 2), st.sampled_from("ab")),
    st.tuples(st.just("mark"), run_at, texts, st.sampled_from("ab"), values),
    st.tuples(st.just("lift"), st.integers(0, 2)),
    st.tuples(st.just("reconcile"), run_at, st.booleans(), values),
    st.tuples(st.just("revive"), run_at, st.sampled_from([0, 60])),
    st.tuples(st.just("hold_resource"), st.sampled_from("ab")),
    st.tuples(st.just("leave_resource"), st.sampled_from("ab"), st.booleans()),
    st.tuples(st.just("lease_ends"), run_at),
    st.tuples(st.just("grant_ends"), run_at),
    st.tuples(st.just("sweep_locks"), st.sampled_from([1, 9])),
    st.tuples(st.just("sweep_grants")),
    st.tuples(st.just("deadline_passes"), run_at),
)
started = [("create", 0, None, "d", {}), ("create", 1, None, "d", {}), ("take", 0), ("take", 1)]


class World:
    """One storage, and what was got from it so far."""

    def __init__(self, bench: Any, people: list[Any]) -> None:
        self.bench = bench
        self.plane = bench.locking("thing.fire").locking("thing.write", scope=LockScope.RUN).control_plane
        self.rich = bench.with_policy(**RICH).control_plane
        self.strict = bench.with_policy(**STRICT).control_plane
        self.people = people
        self.treasurer = replace(people[1], scopes=people[1].scopes | {"plm.budgets"})
        self.names: dict[str, str] = {}
        self.runs: dict[int, Any] = {}
        self.leases: dict[int, Any] = {}
        self.grants: dict[int, Any] = {}
        self.tickets: dict[int, Any] = {}
        self.halts: list[Any] = []
        self.held: dict[str, Any] = {}

    def plain(self, answer: Any) -> str:
        """An answer in which ids are numbered as they appear, and times and waits are all one."""
        text = _TIME.sub("<time>", repr(answer) if not isinstance(answer, str) else answer)
        text = _WAIT.sub("<wait>", text)
        text = _AMOUNT.sub(lambda found: format(Decimal(found.group(1)).normalize(), "f"), text)
        for kind in (_UUID, _SPAN):
            text = kind.sub(lambda found: self.names.setdefault(found.group(), f"<{len(self.names)}>"), text)
        return re.sub(r"UUID\('(<\d+>)'\)", r"\1", text)

    async def do(self, operation: tuple[Any, ...]) -> str:
        name, *rest = operation
        try:
            return self.plain(await getattr(self, name)(*rest))
        except ControlPlaneError as error:
            return self.plain(f"{type(error).__name__} {error} {sorted(vars(error).items())}")
        except KeyError as missing:
            return f"nothing yet: {missing}"

    async def create(self, at, key, digest, value, strict=False):
        request = self.bench.request(
            trace_id=f"{at:032x}",
            root_span_id=f"{at:016x}",
            run_group_id=uuid.UUID(int=7),
            input={"v": value},
            idempotency_key=key,
            request_digest=digest,
        )
        plane = self.strict if strict else self.plane
        run, replayed = await plane.create_run(request, principal=self.bench.requester)
        self.runs[at] = run
        return run, replayed

    async def take(self, at):
        lease = await self.bench.storage.runs.take(self.bench.tenant, self.runs[at].id, owner="w", seconds=600)
        if lease is not None:
            self.leases[at] = lease
        return lease

    async def renew(self, at):
        lease = self.leases[at]
        return await self.bench.storage.runs.renew(
            self.bench.tenant, lease.run.id, fencing_token=lease.fencing_token, seconds=600
        )

    async def admit(self, at, step, attempt, capability, value, with_ticket, rich=False, begin=False):
        changes = {"step_index": step, "attempt": attempt, "step_id": f"s{step}", "capability": capability}
        ticket_id = self.tickets[at].ticket_id if with_ticket and at in self.tickets else None
        admission = await (self.rich if rich else self.plane).admit(
            self.bench.proposal(self.leases[at], arguments={"name": value}, ticket_id=ticket_id, **changes), begin=begin
        )
        if isinstance(admission, Granted):
            self.grants[at] = (admission.grant, capability)
        if isinstance(admission, Pending):
            self.tickets[at] = admission
        return admission

    async def begin(self, at):
        return await self.bench.begin(self.grants[at][0], self.leases[at])

    async def settle(self, at, status, output, error, things, strict=False):
        grant, capability = self.grants[at]
        usage = {"thing": things} if things is not None else None
        outcome = Outcome(
            status=status, output=output, error=error, usage=usage and _decimals(usage), evidence=Evidence.MEASURED
        )
        lease = self.leases[at]
        return await (self.strict if strict else self.plane).settle(
            grant,
            outcome,
            capability=self.plane.capability(capability),
            fencing_token=lease.fencing_token,
            trace_id=lease.run.trace_id,
            actor="worker:w",
        )

    async def finish(self, at, state, value):
        lease = self.leases[at]
        return await self.plane.finish(
            lease.run, fencing_token=lease.fencing_token, state=state, actor="worker:w", reason="because", result=value
        )

    async def decide(self, at, decision, who, comment):
        return await self.bench.decide(self.tickets[at], decision, approver=self.people[who], comment=comment)

    async def vote(self, at, decision, who, standing):
        terms = ScopeTerms(uses=2, seconds=60) if standing else None
        ticket_id, approver = self.tickets[at].ticket_id, self.people[who]
        return await self.rich.decide(self.bench.tenant, ticket_id, decision, approver=approver, scope=terms)

    async def ask(self, at, step, attempt, question, allowed):
        lease = self.leases[at]
        answer = await (self.rich if allowed else self.plane).ask(
            InputRequest(
                tenant_id=self.bench.tenant,
                run_id=lease.run.id,
                fencing_token=lease.fencing_token,
                step_index=step,
                attempt=attempt,
                step_id=f"s{step}",
                question=question,
                schema={"not": {"type": "null", "default": None}},
                principal=lease.run.principal,
                escalates=_FAILURE if question == "r" else None,
            )
        )
        if isinstance(answer, Pending):
            self.tickets[at] = answer
        return answer

    async def give(self, at, value, who, comment):
        ticket_id, approver = self.tickets[at].ticket_id, self.people[who]
        return await self.rich.provide_input(self.bench.tenant, ticket_id, value, approver=approver, comment=comment)

    async def refuse_to_give(self, at, who):
        ticket_id, approver = self.tickets[at].ticket_id, self.people[who]
        return await self.rich.decide(self.bench.tenant, ticket_id, TicketDecision.DENY, approver=approver)

    async def comment(self, at, body):
        ticket_id = self.tickets[at].ticket_id
        return await self.plane.approvals.comment(self.bench.tenant, ticket_id, body, author=self.people[1])

    async def revoke_scope(self):
        scopes = await self.bench.storage.approvals.scopes(self.bench.tenant, limit=9, after=None)
        if not scopes:
            raise KeyError("approval scope")
        return await self.plane.approvals.revoke_scope(self.bench.tenant, scopes[0].id, by=self.people[1])

    async def cancel(self, at):
        return await self.plane.cancel(self.bench.tenant, self.runs[at].id, by=self.bench.requester)

    async def halt(self, scope, at):
        halt = await self.bench.halt(scope, self.runs[at].id if scope is HaltScope.RUN else None)
        self.halts.append(halt)
        return halt

    async def halt_by_name(self, scope):
        subject = "test" if scope is HaltScope.AGENT else "thing.read"
        halt = await self.plane.halt(
            self.bench.tenant, scope, None, subject=subject, reason="stop", by=self.bench.approver
        )
        self.halts.append(halt)
        return halt

    async def drill(self, scope):
        subject = {HaltScope.AGENT: "test", HaltScope.CAPABILITY: "thing.read"}.get(scope)
        told = await self.plane.drill(self.bench.tenant, scope, subject=subject, by=self.bench.approver)
        return sorted(told.runs.items()), told.grants, told.calls

    async def end_halted(self):
        return await self.bench.storage.halts.end_halted(self.bench.tenant)

    def key(self, budget):
        scope, period = budget
        subject = "test" if scope is BudgetScope.AGENT else str(self.bench.tenant)
        return BudgetKey.of(scope, subject, "calls", period)

    async def set_budget(self, budget, limit):
        return await self.plane.set_budget(self.bench.tenant, self.key(budget), Decimal(limit), by=self.treasurer)

    async def correct_budget(self, budget, amount, command):
        return await self.plane.correct_budget(
            self.bench.tenant, self.key(budget), Decimal(amount), reason="x", command_id=command, by=self.treasurer
        )

    async def mark(self, at, name, command, details):
        return await self.plane.mark(
            self.bench.tenant, self.runs[at].id, name, command_id=command, details=details, by=self.bench.requester
        )

    async def lift(self, back):
        if len(self.halts) <= back:
            raise KeyError("halt")
        return await self.plane.lift(self.bench.tenant, self.halts[-1 - back].id, by=self.bench.approver)

    async def reconcile(self, at, happened, output):
        return await self.bench.storage.runs.reconcile(
            self.bench.tenant, self.runs[at].id, happened=happened, output=output, actor="human:x"
        )

    async def revive(self, at, patience):
        return await self.bench.storage.runs.revive(self.bench.tenant, self.runs[at].id, patience_seconds=patience)

    async def hold_resource(self, name):
        if name in self.held:
            await self.plane.require_lease(self.held[name])
            return await self.plane.renew_lease(self.held[name], seconds=60)
        taken = await self.plane.acquire_lease(self.bench.tenant, name, owner="x", seconds=60, by=self.bench.requester)
        if taken is not None:
            self.held[name] = taken
        return taken

    async def leave_resource(self, name, forgotten):
        lease = self.held.pop(name)
        if forgotten:
            where = {"name": name, "tenant_id": self.bench.tenant}
            self.bench.behind.set_time("resource_leases", "expires_at", -1, where)
        else:
            await self.plane.release_lease(lease, by=self.bench.requester)
        return await self.bench.storage.leases.list(self.bench.tenant, limit=9)

    async def lease_ends(self, at):
        self.bench.behind.set_time(
            "run_states", "lease_expires_at", -1, {"run_id": self.runs[at].id, "state": "running"}
        )

    async def grant_ends(self, at):
        grant, _ = self.grants[at]
        self.bench.behind.set_time("grants", "expires_at", -1, {"id": grant.id})

    async def sweep_locks(self, limit):
        return await self.bench.storage.locks.sweep(self.bench.tenant, limit=limit)

    async def sweep_grants(self):
        await Recovery(self.bench.storage)._expired.close()

    async def deadline_passes(self, at):
        self.bench.let_deadline_pass(self.tickets[at])

    async def everything(self) -> dict[str, str]:
        """Events, steps, budgets, tickets and jobs, as texts."""
        storage, tenant = self.bench.storage, self.bench.tenant
        found = {}
        for at, run in self.runs.items():
            found[f"run {at}"] = self.plain(await storage.runs.get(tenant, run.id))
            found[f"steps {at}"] = self.plain(await storage.runs.steps(tenant, run.id))
            found[f"budgets {at}"] = self.plain(sorted(map(_figures, await storage.runs.budgets(tenant, run.id))))
            found[f"jobs {at}"] = str(self.bench.deliveries(run))
            mcrc = await storage.runs.mcrc(tenant, run.id)
            found[f"mcrc {at}"] = self.plain(_without_times(mcrc))
            events = await storage.events.read(tenant, run_stream(run.id))
            found[f"events {at}"] = "\n".join(self.plain(f"{e.seq} {e.kind} {e.actor} {e.payload}") for e in events)
        events = await storage.events.read(tenant, "tenant")
        found["tenant"] = "\n".join(self.plain(f"{e.seq} {e.kind} {e.actor} {e.payload}") for e in events)
        tickets = await storage.approvals.list(tenant, limit=99, after=None, state=None)
        found["tickets"] = self.plain(tickets)
        found["votes"] = self.plain([await storage.approvals.votes(tenant, ticket.id) for ticket in tickets])
        found["comments"] = self.plain([await storage.approvals.comments(tenant, ticket.id) for ticket in tickets])
        found["scopes"] = self.plain(await storage.approvals.scopes(tenant, limit=99, after=None))
        found["locks"] = self.plain(await storage.locks.list(tenant, limit=99))
        found["feed"] = self.plain([(e.stream, e.seq) for e in (await storage.events.feed(tenant)).events])
        found["chains"] = str({each.consistent for each in await self.plane.verify_events(tenant)})
        return found


def _decimals(usage):
    return {unit: Decimal(amount) / 100 for unit, amount in usage.items()}


def _figures(budget):
    return (
        budget.scope.value,
        str(budget.unit),
        *(f"{each:.8f}" for each in (budget.limit, budget.spent, budget.reserved)),
    )


def _without_times(row):
    return sorted(
        (name, f"{float(value):.8f}" if "cost_eur" in name else value)
        for name, value in row.items()
        if not name.endswith("_at")
    )


@pytest.mark.timeout(900)
@settings(
    max_examples=max(10, int(200 * SOAK)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(operations, max_size=25))
@example(
    [
        ("admit", 0, 0, 1, "thing.write", {"a": 1e20, "é": -0.0}, False),
        ("decide", 0, TicketDecision.APPROVE, 0, ""),
        ("decide", 0, TicketDecision.APPROVE, 1, "no"),
        ("decide", 0, TicketDecision.DENY, 2, ""),
        ("halt", HaltScope.RUN, 0),
        ("take", 0),
        ("renew", 0),
        ("admit", 0, 0, 1, "thing.write", {"a": 1e20, "é": -0.0}, True),
        ("finish", 0, RunState.HALTED, None),
        ("lift", 0),
        ("take", 0),
        ("admit", 0, 0, 2, "thing.write", {"a": 1e20, "é": -0.0}, True),
        ("begin", 0),
        ("begin", 0),
        ("lease_ends", 0),
        ("settle", 0, OutcomeStatus.SUCCEEDED, {"x": [1e-7, 5e-324]}, None, 777),
        ("take", 0),
        ("admit", 0, 1, 1, "thing.fire", None, False),
        ("begin", 0),
        ("settle", 0, OutcomeStatus.OUTCOME_UNKNOWN, None, {"category": "x", "message": 0.5}, None),
        ("reconcile", 0, True, {"b": 2, "a": 1}),
        ("admit", 1, 0, 1, "thing.write", "x", False),
        ("deadline_passes", 1),
        ("revive", 1, 60),
        ("decide", 1, TicketDecision.APPROVE, 1, ""),
        ("take", 1),
        ("admit", 1, 0, 1, "thing.write", "x", True),
        ("finish", 1, RunState.FAILED, [1.0]),
        ("cancel", 1),
    ]
)
@example(
    [
        ("admit", 0, 0, 1, "thing.fire", "x", False),
        ("grant_ends", 0),
        ("sweep_grants",),
        ("begin", 0),
        ("settle", 0, OutcomeStatus.NOT_STARTED, None, {"category": "x", "message": "late"}, None),
        ("settle", 0, OutcomeStatus.SUCCEEDED, None, None, None),
        ("admit", 0, 0, 2, "thing.fire", "x", False),
        ("begin", 0),
        ("grant_ends", 1),
        ("sweep_grants",),
    ]
)
@example(
    [
        ("admit", 0, 0, 1, "thing.fire", "x", False),
        ("admit", 1, 0, 1, "thing.fire", "y", False, False, True),
        ("grant_ends", 0),
        ("admit", 1, 0, 2, "thing.fire", "y", False, False, True),
        ("begin", 0),
        ("admit", 0, 1, 1, "thing.fire", "x", False),
        ("settle", 1, OutcomeStatus.OUTCOME_UNKNOWN, None, None, None),
        ("sweep_locks", 9),
        ("admit", 0, 1, 2, "thing.fire", "x", False),
        ("reconcile", 1, False, None),
        ("admit", 0, 1, 3, "thing.fire", "x", False),
        ("halt", HaltScope.RUN, 0),
        ("end_halted",),
        ("sweep_locks", 9),
    ]
)
@example(
    [
        ("create", 0, "k", "d", ["axe"], True),
        ("create", 0, "k", "d", 7, True),
        ("create", 1, "k", "d", ["axe"], True),
        ("create", 1, "k", "e", ["axe"], True),
        ("take", 0),
        ("admit", 0, 0, 1, "thing.fire", 1, False),
        ("begin", 0),
        ("settle", 0, OutcomeStatus.SUCCEEDED, {"a": 1}, None, 7, True),
        ("settle", 0, OutcomeStatus.SUCCEEDED, {"a": 1}, None, 7, False),
        ("admit", 0, 1, 1, "thing.fire", 1, False),
        ("begin", 0),
        ("settle", 0, OutcomeStatus.FAILED, None, {"category": "x", "message": "b"}, None, True),
        ("admit", 0, 1, 2, "thing.fire", 1, False),
        ("begin", 0),
        ("settle", 0, OutcomeStatus.SUCCEEDED, 7, None, 7, True),
    ]
)
@example(
    [
        ("admit", 0, 0, 1, "thing.write", "x", False, True),
        ("comment", 0, "why?"),
        ("vote", 0, TicketDecision.APPROVE, 1, True),
        ("vote", 0, TicketDecision.DENY, 1, False),
        ("vote", 0, TicketDecision.APPROVE, 2, True),
        ("take", 0),
        ("admit", 0, 0, 1, "thing.write", "x", True, True),
        ("admit", 0, 1, 1, "thing.write", "y", False, True),
        *(("admit", 1, step, 1, "thing.read", step, False, True) for step in range(7)),
        ("revoke_scope",),
        ("admit", 0, 2, 1, "thing.write", "z", False, True),
        ("deadline_passes", 0),
        ("revive", 0, 60),
        ("vote", 0, TicketDecision.APPROVE, 1, False),
        ("take", 0),
    ]
)
@example(
    [
        ("admit", 0, 0, 1, "thing.read", "x", False, False, True),
        ("admit", 0, 0, 1, "thing.read", "x", False, False, False),
        ("begin", 0),
        ("lease_ends", 0),
        ("admit", 0, 0, 1, "thing.read", "x", False, False, True),
        ("take", 0),
        ("admit", 0, 0, 1, "thing.read", "x", False, False, True),
        ("settle", 0, OutcomeStatus.SUPERSEDED, None, None, None),
        ("admit", 0, 0, 1, "thing.read", "x", False, False, True),
        ("admit", 0, 1, 1, "thing.read", "x", False, False, True),
        ("settle", 0, OutcomeStatus.SUCCEEDED, None, None, 3),
        ("admit", 0, 1, 1, "thing.read", "x", False, False, True),
        ("admit", 0, 2, 1, "thing.write", "x", False, False, True),
        ("decide", 0, TicketDecision.APPROVE, 1, ""),
        ("take", 0),
        ("admit", 0, 2, 1, "thing.write", "x", True, False, True),
        ("cancel", 0),
        ("admit", 0, 3, 1, "thing.write", "x", False, False, True),
        ("admit", 0, 4, 1, "thing.read", "x", False, False, True),
        ("admit", 0, 5, 1, "thing.read", "x", False, False, False),
        ("halt", HaltScope.RUN, 1),
        ("admit", 1, 0, 1, "thing.read", "x", False, False, True),
    ]
)
@example(
    [
        ("hold_resource", "a"),
        ("hold_resource", "a"),
        ("leave_resource", "a", True),
        ("hold_resource", "a"),
        ("leave_resource", "a", False),
        ("hold_resource", "a"),
        ("set_budget", BUDGETS[0], 2),
        ("admit", 0, 0, 1, "thing.read", 1, False, True),
        ("correct_budget", BUDGETS[0], 1, "a"),
        ("correct_budget", BUDGETS[0], 1, "a"),
        ("correct_budget", BUDGETS[0], -9, "b"),
        ("admit", 1, 0, 1, "thing.read", 1, False, True),
        ("set_budget", BUDGETS[1], 0),
        ("begin", 0),
        ("halt_by_name", HaltScope.CAPABILITY),
        ("end_halted",),
        ("renew", 0),
        ("admit", 1, 1, 1, "thing.read", 1, False),
        ("settle", 0, OutcomeStatus.CANCELLED, None, None, 3),
        ("lift", 0),
        ("halt_by_name", HaltScope.AGENT),
        ("end_halted",),
        ("finish", 1, RunState.HALTED, None),
        ("lift", 0),
    ]
)
@example(
    [
        ("create", 0, "k", "d", None),
        ("create", 1, "k", "d", None),
        ("create", 1, "k", "e", None),
        ("take", 0),
        *(("admit", 0, step, 1, "thing.read", step, False) for step in range(12)),
        ("cancel", 0),
        ("begin", 0),
        ("settle", 0, OutcomeStatus.NOT_STARTED, None, None, 0),
        ("halt", HaltScope.TENANT, 0),
        ("admit", 0, 20, 1, "thing.read", 1, False),
    ]
)
def test_the_same_operations_have_the_same_answers_and_write_the_same_events(twins, operations):
    asyncio.run(twins(started + operations))


@pytest.fixture
def twins(engine_database, twin_benches):
    """Does operations on both storages, each time for tenants of their own."""

    async def compare(operations):
        async with open_pool(engine_database.app, max_size=2) as pool:
            benches = twin_benches(pool)
            approver = benches[0].approver
            people = [benches[0].requester, approver, replace(approver, user_id=uuid.UUID(int=1))]
            worlds = [World(bench, people) for bench in benches]
            for operation in operations:
                in_memory, in_postgres = [await world.do(operation) for world in worlds]
                assert in_memory == in_postgres, operation
            in_memory, in_postgres = [await world.everything() for world in worlds]
            for name, found in in_memory.items():
                assert found == in_postgres[name], name

    return compare
