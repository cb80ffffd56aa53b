"""Why something stands where it stands: answered from the records alone, for a run, an attempt, a ticket or a budget.

A budget is named by whose it is, as people name that, and by what it counts: `agent/reviewer/EUR/day`.

What the record says of itself (the rule, the limit, what would unblock it) counts; `UNBLOCKED_BY` says the rest.

One module although it is long: a run is explained by its attempt, and that by its ticket or budget, in the same words.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_shared.canonical_json import compact_json

from plm_engine_core.control_plane.admission.grants import Begun
from plm_engine_core.control_plane.admission.withheld import withheld_of
from plm_engine_core.control_plane.errors import InvalidRequest, NotFound
from plm_engine_core.control_plane.halts import Halt
from plm_engine_core.control_plane.hitl import ApprovalTicket
from plm_engine_core.control_plane.limits.budgets import Budget, BudgetKey
from plm_engine_core.control_plane.runs.run import Run, Step, still_wants
from plm_engine_core.control_plane.storage.ports import Storage
from plm_engine_core.control_plane.vocabulary import (
    PROVIDE_INPUT,
    BudgetScope,
    EvaluationPhase,
    HaltScope,
    Period,
    Reason,
    RunKind,
    RunState,
    Stage,
    StepState,
    TicketKind,
    TicketState,
)

logger = logging.getLogger(__name__)

UNBLOCKED_BY: Mapping[str, str] = {
    Reason.RATE_LIMIT_EXCEEDED: "time: it is tried again by itself",
    Reason.CAPABILITY_UNKNOWN: "registering the capability and starting a new run",
    Reason.CAPABILITY_INACTIVE: "an active version of the capability, and a new run",
    Reason.DENIED_TENANT: "taking the tenant off the capability's denied_tenants, and a new run",
    Reason.NOT_ALLOWED_TENANT: "putting the tenant on the capability's allowed_tenants, and a new run",
    Reason.AGENT_INACTIVE: "an active registration of the agent, and a new run",
    Reason.AGENT_CEILING: "a wider registration of the agent, by its owner, and a new run",
    Reason.DELEGATION_EXPIRED: "a new delegation, and a new run",
    Reason.MISSING_SCOPES: "a new run, created with a token that holds the OAuth scopes",
    Reason.MODEL_NOT_ALLOWED: "a model that the policy allows, or another policy",
    Reason.AUTONOMY_TOO_LOW: "a higher autonomy ceiling in the policy, or a tier that asks a human",
    Reason.POLICY_MISSING: "a process that can load the active policy, or activating one that this one can",
    Reason.POLICY_CHANGED: "time: it is decided anew by itself, by the policy that is active now",
    Reason.CAPABILITY_BLOCKED: "another tier in the policy",
    Reason.RULE_DENIED: "another proposal than the rule denies, or another rule",
    Reason.EVALUATOR_DENIED: "another proposal than the evaluator denies, or another policy",
    Reason.EVALUATOR_FAILED: "an evaluator that answers: look into the log of the run worker",
    Reason.STEERED: "proposing what the guidance says instead",
    Reason.APPROVAL_REQUIRED: "a human who approves its ticket before the deadline, and did not ask for it",
    Reason.APPROVAL_DENIED: "a new run, proposing what the approver's comment leaves",
    Reason.APPROVAL_EXPIRED: "a new run, decided in time",
    Reason.APPROVAL_MISMATCH: "a new approval: this one is for another call or policy, or was used",
    Reason.INPUT_NOT_ALLOWED: "a policy that lets agents ask, or ask more often",
    Reason.INPUT_REQUIRED: "a human who gives the input, or denies it, before the deadline",
    Reason.INPUT_DENIED: "going on without the input, or a new run",
    Reason.INPUT_EXPIRED: "a new run, answered in time",
    Reason.BUDGET_EXCEEDED: "a new run with a higher limit, or for the tenant's budget another limit",
    Reason.BUDGET_MISSING: "setting the budget",
    Reason.RESOURCE_LOCKED: "the end of the call that holds the resource: it is tried again by itself",
    Reason.HALTED: "lifting the halt, or cancelling the run",
    Reason.STORAGE_BUSY: "time: it is tried again by itself",
    Reason.GRANT_EXPIRED: "time: it is admitted again by itself",
    Reason.GRANT_USED: "nothing: each grant is good for one call",
    Reason.CANCEL_REQUESTED: "nothing: somebody cancelled the run",
    Reason.LEASE_EXPIRED: "time: another run worker takes the run over",
}
"""By reason, what would let it go on; completions of "unblocked by"."""

_BY_RUN_STATE: Mapping[RunState, str] = {
    RunState.QUEUED: "a run worker that takes it: is one running, with the plugins it needs?",
    RunState.RUNNING: "nothing: a run worker moves it forward",
    RunState.HALTED: "time: its halt was lifted, and recovery queues it again",
    RunState.OUTCOME_UNKNOWN: "finding out whether the effect took place, then plm-cli run reconcile",
}
_BY_EXTERNAL_RUN_STATE: Mapping[RunState, str] = {
    **_BY_RUN_STATE,
    RunState.QUEUED: "whoever made it, who takes it up again",
    RunState.RUNNING: "nothing: whoever made it moves it forward",
}
_BY_TICKET_STATE: Mapping[TicketState, str] = {
    TicketState.PENDING: UNBLOCKED_BY[Reason.APPROVAL_REQUIRED],
    TicketState.DENIED: UNBLOCKED_BY[Reason.APPROVAL_DENIED],
    TicketState.EXPIRED: UNBLOCKED_BY[Reason.APPROVAL_EXPIRED],
}
_BY_ASK_STATE: Mapping[TicketState, str] = {
    TicketState.PENDING: UNBLOCKED_BY[Reason.INPUT_REQUIRED],
    TicketState.DENIED: UNBLOCKED_BY[Reason.INPUT_DENIED],
    TicketState.EXPIRED: UNBLOCKED_BY[Reason.INPUT_EXPIRED],
}
_WAITING = (RunState.QUEUED, RunState.HALTED, RunState.AWAITING_APPROVAL)
_REPLACED = (
    "a decision, after which the call is asked for anew, by a run of an agent itself: another policy was activated "
    "since, under which this approval counts for nothing"
)
_LONGEST_SHOWN = 200

_BOOKED_AT: Mapping[str, str] = {
    Reason.HALTED: "halt",
    Reason.CANCEL_REQUESTED: "cancel",
    Reason.LEASE_EXPIRED: "lease",
    Reason.APPROVAL_DENIED: "approval",
    Reason.APPROVAL_EXPIRED: "approval",
    Reason.APPROVAL_MISMATCH: "approval",
    Reason.INPUT_NOT_ALLOWED: "approval",
    Reason.INPUT_REQUIRED: "approval",
    Reason.INPUT_DENIED: "approval",
    Reason.INPUT_EXPIRED: "approval",
    Reason.BUDGET_EXCEEDED: Stage.COST_BUDGET,
    Reason.BUDGET_MISSING: Stage.COST_BUDGET,
    Reason.RESOURCE_LOCKED: "lock",
}
_REFUSED = (StepState.DENIED, StepState.STEERED)
_MOST_OF_ONE = 1_000
_OF_STAGE = frozenset({"stage", "passed"})
_DIGITS = 10  # of the number of a step or attempt, which the books keep in 32 bits
_SCOPES, _PERIODS = frozenset(BudgetScope), frozenset(Period)
_FORMS = "RUN, TICKET, RUN/STEP/ATTEMPT, RUN/UNIT, TENANT/UNIT or SCOPE/NAME/UNIT[/PERIOD]"


def not_begun(reason: Reason, message: str) -> Begun:
    """The refusal of a call that was granted."""
    return Begun(
        accepted=False,
        reason=reason,
        message=message,
        rule=_BOOKED_AT.get(reason, "grant"),
        unblock=UNBLOCKED_BY[reason],
    )


@dataclass(frozen=True, kw_only=True)
class Why:
    """An answer. `stage` is where it was decided, `rule` the place in the policy, `limit` the budget that bound.

    `lock` is the call that holds the resource. `unblocked_by` is empty where nothing is blocked. `because` leads on to
    what decided it: a run to its last attempt, an attempt to its ticket.
    """

    kind: str
    id: str
    state: str
    message: str = ""
    reason: str | None = None
    stage: str | None = None
    rule: str | None = None
    limit: Mapping[str, Any] = field(default_factory=dict)
    lock: Mapping[str, Any] = field(default_factory=dict)
    policy_digest: str | None = None
    unblocked_by: str = ""
    because: Why | None = None

    def to_json(self) -> dict[str, Any]:
        """The answer as JSON values, empty ones left out."""
        said = {name: value for name, value in vars(self).items() if value not in (None, "", {}) and name != "because"}
        return {**said, "because": self.because.to_json()} if self.because is not None else said


async def why(storage: Storage, tenant_id: UUID, asked: str) -> Why:
    """Explain what `asked` names in a tenant: the id of a run or ticket, RUN/STEP[/ATTEMPT], or a budget.

    A budget is RUN/UNIT, TENANT/UNIT, or SCOPE/NAME/UNIT[/PERIOD]: its scope (`run`, `run_group`, `agent`, `user`,
    `team`, `model` or `tenant`), the name or id there, the unit, and the window when it has one (`day`, `week` or
    `month`).

    Raises:
        InvalidRequest: it has none of these forms, or its record is damaged.
        NotFound: nothing of that name exists in the tenant.
    """
    asked = str(asked).strip()
    try:
        return await _why(storage, tenant_id, asked)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        logger.info("a record cannot be read", extra={"asked": asked[:80]}, exc_info=True)
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise InvalidRequest(f"the record of {asked:.80} cannot be read: {words:.200}", field="id") from error


async def _why(storage: Storage, tenant_id: UUID, asked: str) -> Why:
    first, *rest = asked.split("/")
    if first in _SCOPES:
        return await _of_budget(storage, tenant_id, _key(BudgetScope(first), rest))
    identifier = _uuid(first)
    match rest:
        case []:
            return await _of_run_or_ticket(storage, tenant_id, identifier)
        case [step, *attempt] if len(rest) <= 2 and all(part.isdecimal() and len(part) <= _DIGITS for part in rest):
            steps = await storage.runs.steps(tenant_id, identifier)
            wanted = [each for each in steps if each.step_index == int(step)]
            chosen = [each for each in wanted if not attempt or each.attempt == int(attempt[0])]
            if not chosen:
                raise NotFound("attempt", asked)
            return await _of_step(storage, tenant_id, identifier, chosen[-1])
        case [unit]:
            scope = BudgetScope.TENANT if identifier == tenant_id else BudgetScope.RUN
            return await _of_budget(storage, tenant_id, BudgetKey(scope=scope, scope_id=identifier, unit=unit))
    raise _nameless(asked)


def _nameless(asked: str) -> InvalidRequest:
    return InvalidRequest(f"{asked!r:.80} names nothing; give {_FORMS}", field="id")


def _key(scope: BudgetScope, rest: Sequence[str]) -> BudgetKey:
    """What stands after the scope; a name may hold slashes, as those of language models do."""
    *named, period = rest if rest and rest[-1] in _PERIODS else (*rest, Period.TOTAL)
    *name, unit = named or [""]
    if not any(name):
        raise _nameless("/".join((scope, *rest)))
    return BudgetKey.of(scope, "/".join(name), unit, Period(period))


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidRequest(f"{text!r:.80} is no id; ids are UUIDs", field="id") from None


async def _of_run_or_ticket(storage: Storage, tenant_id: UUID, identifier: UUID) -> Why:
    try:
        run = await storage.runs.get(tenant_id, identifier)
    except NotFound:
        try:
            return await _of_ticket(storage, tenant_id, await storage.approvals.get(tenant_id, identifier))
        except NotFound:
            raise NotFound("run or ticket", identifier) from None
    steps = await storage.runs.steps(tenant_id, identifier)
    last = await _of_step(storage, tenant_id, run.id, steps[-1]) if steps else None
    halts = await halts_over(storage, run, steps[-1] if steps else None) if run.state in _WAITING else ()
    return of_run(run, last, halts)


async def halts_over(storage: Storage, run: Run, last: Step | None) -> Sequence[Halt]:
    """What keeps the run from going on, or will once it is its turn, from wide to narrow."""
    wanted = last.capability if last is not None and still_wants(last.state, last.error) else None
    standing = await storage.halts.list(run.tenant_id, limit=_MOST_OF_ONE, before=None, standing=True)
    over = [halt for halt in standing if _stands_over(halt, run, wanted)]
    return sorted(over, key=lambda halt: [*HaltScope].index(halt.scope))


def lifting_of(halts: Sequence[Halt]) -> str:
    """What lets go on what these halts stand over; some of them, in the words of `UNBLOCKED_BY`."""
    return "lifting " + " and ".join(f"the halt {halt.id}" for halt in halts)


def _stands_over(halt: Halt, run: Run, wanted: str | None) -> bool:
    match halt.scope:
        case HaltScope.SYSTEM | HaltScope.TENANT:
            return True
        case HaltScope.AGENT:
            return halt.subject == run.subjects.agent_id
        case HaltScope.RUN_GROUP:
            return halt.scope_id == run.subjects.run_group_id
        case HaltScope.RUN:
            return halt.scope_id == run.id
    return halt.subject == wanted  # which capability comes after it is not known yet


async def _of_step(storage: Storage, tenant_id: UUID, run_id: UUID, step: Step) -> Why:
    if step.ticket_id is None:
        return of_step(run_id, step, None)
    ticket = await storage.approvals.get(tenant_id, step.ticket_id)
    return of_step(run_id, step, ticket, replaced=await _is_replaced(storage, ticket))


async def _of_ticket(storage: Storage, tenant_id: UUID, ticket: ApprovalTicket) -> Why:
    if ticket.state is not TicketState.PENDING:
        return of_ticket(ticket)
    steps = await storage.runs.steps(tenant_id, ticket.run_id, since=ticket.step_index)
    needs = next((_needs(step, ticket) for step in steps if step.ticket_id == ticket.id), "")
    return of_ticket(ticket, needs=needs, replaced=await _is_replaced(storage, ticket))


async def _is_replaced(storage: Storage, ticket: ApprovalTicket) -> bool:
    """Whether a ticket waits for an approval that would count for nothing: another policy is active than asked."""
    if ticket.state is not TicketState.PENDING or ticket.kind is TicketKind.INPUT:
        return False
    active, _ = (await storage.policies.standing()).digests
    return active is not None and active != ticket.policy_digest


def _needs(step: Step, ticket: ApprovalTicket) -> str:
    """Whose approval it was decided that the call needs; nothing where it is others' by now."""
    return str(_readable(step.decision).get("unblock", "")) if ticket.escalated_at is None else ""


async def _of_budget(storage: Storage, tenant_id: UUID, key: BudgetKey) -> Why:
    found = await storage.budgets.list(tenant_id, limit=_MOST_OF_ONE, scope=key.scope, scope_id=key.scope_id)
    for budget in found:
        if (budget.unit, budget.period) == (key.unit, key.period):
            return of_budget(budget)
    raise NotFound("budget", _name_of(key))


def _name_of(budget: Budget | BudgetKey) -> str:
    """The name of a budget, as `why` takes it."""
    window = () if budget.period is Period.TOTAL else (budget.period.value,)
    return "/".join((budget.scope.value, str(budget.subject or budget.scope_id), budget.unit, *window))


def of_run(run: Run, last: Why | None, halts: Sequence[Halt] = ()) -> Why:
    """Why a run stands where it stands; `last` is about its last attempt, `halts` stand over a run that waits."""
    lifting = lifting_of(halts) if halts else ""
    if halts and run.state is not RunState.AWAITING_APPROVAL:
        return Why(
            kind="run",
            id=str(run.id),
            state=run.state.value,
            reason=Reason.HALTED.value,
            message="; ".join(f"a {halt.scope.value} halt stands: {halt.reason}" for halt in halts),
            policy_digest=run.policy_digest,
            unblocked_by=f"{lifting}, or cancelling the run",
            because=last,
        )
    reason = run.reason or None
    blocked = run.state not in (RunState.SUCCEEDED, RunState.CANCELLED)
    by_state = _BY_EXTERNAL_RUN_STATE if run.kind is RunKind.EXTERNAL else _BY_RUN_STATE
    turn = run.state is RunState.QUEUED and reason is not None  # it was given back to wait, and says for what
    unblocked_by = "" if turn else by_state.get(run.state, "")
    if blocked and not unblocked_by:
        of_last = last.unblocked_by if last is not None and last.reason == reason else ""
        unblocked_by = of_last or UNBLOCKED_BY.get(reason or "", "a new run, once what the message says is mended")
    if lifting:
        unblocked_by += f", and {lifting}"
    if run.state is RunState.FAILED and not unblocked_by.startswith("nothing") and "new run" not in unblocked_by:
        unblocked_by += ", and a new run"
    return Why(
        kind="run",
        id=str(run.id),
        state=run.state.value,
        reason=reason,
        message=run.message or "",
        policy_digest=run.policy_digest,
        unblocked_by=unblocked_by,
        because=last,
    )


def of_step(run_id: UUID, step: Step, ticket: ApprovalTicket | None, *, replaced: bool = False) -> Why:
    """Why one attempt was decided as it was; what was booked counts before what the policy had said.

    `replaced` says that the policy under which its ticket was opened is not the active one any more.
    """
    decision = _readable(step.decision)
    withheld = withheld_of(step)
    booked = step.error if (step.state in _REFUSED or withheld is not None) and step.error else {}
    reason = booked.get("reason") or decision.get("reason")
    waiting, asks = step.state is StepState.AWAITING_APPROVAL, step.capability == PROVIDE_INPUT
    if waiting:
        reason = (Reason.INPUT_REQUIRED if asks else Reason.APPROVAL_REQUIRED).value
    blocked = waiting or step.state in _REFUSED or withheld is not None
    by_policy = reason == decision.get("reason") or waiting
    decided = waiting and ticket is not None and ticket.state is not TicketState.PENDING
    known = booked.get("unblock") or (decision.get("unblock", "") if by_policy else "")
    stage = _stage(reason, decision) if blocked and decision else None
    unblocked_by = (known or UNBLOCKED_BY.get(reason or "", "")) if blocked and not decided else ""
    of_its_ticket = of_ticket(ticket, needs=_needs(step, ticket), replaced=replaced) if ticket is not None else None
    if waiting and replaced and of_its_ticket is not None:
        unblocked_by = of_its_ticket.unblocked_by
    return Why(
        kind="attempt",
        id=f"{run_id}/{step.step_index}/{step.attempt}",
        state=step.state.value,
        reason=reason if blocked else None,
        message=str(
            booked.get("message")
            or decision.get("guidance")
            or decision.get("message")
            or ("" if decision else "what was decided cannot be read from its record")
        ),
        stage=EvaluationPhase.OUTPUT.value if withheld is not None else stage,
        rule=booked.get("rule") or decision.get("rule") or None,
        limit=booked.get("limit") or {},
        lock=booked.get("lock") or {},
        unblocked_by=unblocked_by,
        because=of_its_ticket,
    )


def _readable(decision: Any) -> Mapping[str, Any]:
    """A recorded decision, or an empty one where the record is none."""
    if isinstance(decision, Mapping):
        stages = decision.get("stages", [])
        if isinstance(stages, list) and all(isinstance(each, Mapping) and each.keys() >= _OF_STAGE for each in stages):
            return decision
    return {}


def _stage(reason: str | None, decision: Mapping[str, Any]) -> str:
    if reason is not None and reason in _BOOKED_AT and reason != decision.get("reason"):
        return str(_BOOKED_AT[reason])
    stages: Sequence[Mapping[str, Any]] = decision.get("stages", ())
    refused = [each["stage"] for each in stages if not each["passed"]]
    return str(refused[0]) if refused else Stage.CLASSIFY.value


def of_ticket(ticket: ApprovalTicket, *, needs: str = "", replaced: bool = False) -> Why:
    """Where a ticket stands, and who said what.

    `needs` is whose approval lets the call pass, as it was decided; `replaced` that this was by a policy which is not
    the active one any more.
    """
    said = f": {ticket.comment}" if ticket.comment else ""
    asks = ticket.kind is TicketKind.INPUT
    by_state = _BY_ASK_STATE if asks else _BY_TICKET_STATE
    match ticket.state:
        case TicketState.PENDING if asks:
            message = f"an input is asked for until {ticket.deadline:%Y-%m-%d %H:%M:%S} UTC: {_asked(ticket)}"
        case TicketState.APPROVED if asks:
            message = f"given by {ticket.decided_by}{said}; the input is {_shown(ticket.input)}"
        case TicketState.PENDING:
            message = f"{ticket.capability} on {ticket.resource} waits until {ticket.deadline:%Y-%m-%d %H:%M:%S} UTC"
        case TicketState.APPROVED | TicketState.DENIED:
            message = f"{ticket.state.value} by {ticket.decided_by}{said}"
        case TicketState.CANCELLED:
            again = ticket.superseded_by is not None
            message = "its step was proposed again" if again else "its run ended before anybody decided it"
        case _:
            message = f"nobody decided it until {ticket.deadline:%Y-%m-%d %H:%M:%S} UTC"
    if ticket.superseded_by is not None:
        message += f"; ticket {ticket.superseded_by} took its place"
    return Why(
        kind="ticket",
        id=str(ticket.id),
        state="used" if ticket.consumed_at is not None else ticket.state.value,
        message=message,
        rule="approval.input" if asks else f"tier {ticket.tier}",
        policy_digest=ticket.policy_digest,
        unblocked_by=_unblocks(ticket, needs, replaced=replaced) or by_state.get(ticket.state, ""),
    )


def _unblocks(ticket: ApprovalTicket, needs: str, *, replaced: bool) -> str:
    """What lets a call pass whose ticket is open, where more is known of it than its state."""
    if ticket.state is not TicketState.PENDING or ticket.kind is TicketKind.INPUT:
        return ""
    if replaced:
        return _REPLACED
    return f"{needs}, none of whom asked for it" if needs else ""


def _asked(ticket: ApprovalTicket) -> str:
    """What an agent asks, as it stands in the ticket."""
    return str(ticket.arguments.get("question", ""))


def _shown(value: Any) -> str:
    """The beginning of a JSON value; the rest is in the ticket."""
    text = compact_json(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def of_budget(budget: Budget) -> Why:
    """What of a budget is left, what holds the rest, where its limit comes from, and what would let a call pass."""
    left = budget.limit - budget.spent - budget.reserved
    window = "" if budget.period is Period.TOTAL else f" of this {budget.period.value}"
    if budget.time_zone not in (None, "UTC"):
        window += f" in {budget.time_zone}"
    ways = []
    if left <= 0:
        ways += [f"the end of calls that hold {_text(budget.reserved)} {budget.unit}"] if budget.reserved else []
        ways += [f"the next {budget.period.value}, from {_time(budget.ends_at)}"] if budget.ends_at else []
        ways.append("a higher limit: plm-cli budget set")
    return Why(
        kind="budget",
        id=_name_of(budget),
        state="exhausted" if left <= 0 else "open",
        message=f"{_text(left)} {budget.unit} of the {budget.scope.value} budget{window} are left",
        rule=_rule(budget),
        limit={
            "scope": budget.scope.value,
            "unit": budget.unit,
            "period": budget.period.value,
            **{name: _text(getattr(budget, name)) for name in ("limit", "spent", "reserved")},
            **_window(budget),
        },
        unblocked_by=", or ".join(ways),
    )


def _window(budget: Budget) -> dict[str, Any]:
    if budget.starts_at is None or budget.ends_at is None:
        return {}
    times = {name: getattr(budget, name).astimezone(UTC).isoformat() for name in ("starts_at", "ends_at")}
    return {**times, "time_zone": budget.time_zone}


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _rule(budget: Budget) -> str:
    if budget.pinned:
        return "set by an operator"
    of_the_policy = budget.period is Period.TOTAL and budget.scope in (BudgetScope.RUN, BudgetScope.TENANT)
    return f"{'budgets' if of_the_policy else 'limits'}.{budget.scope.value}"


def _text(amount: Decimal) -> str:
    return f"{amount.normalize():f}"
