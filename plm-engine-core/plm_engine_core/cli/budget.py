"""``plm-cli budget``: what may be spent, what is, and how an operator changes it."""

from __future__ import annotations

from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer

from plm_engine_core.cli.caller import Caller, PolicyFile, as_caller, policy_in_force, policy_of
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, one_line, show
from plm_engine_core.cli.storage import Books
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.limits.budgets import Budget, BudgetKey
from plm_engine_core.control_plane.limits.desk import BudgetDesk
from plm_engine_core.control_plane.vocabulary import BudgetScope, Period

app = typer.Typer(help="Look at budgets and change them, as the bearer of PLM_TOKEN.", no_args_is_help=True)

Scope = Annotated[BudgetScope, typer.Argument(help="Whose budget it is.", show_default=False)]
Subject = Annotated[
    str,
    typer.Argument(help="The name of an agent, team or model; the id of a run, run group, user or tenant."),
]
Unit = Annotated[str, typer.Argument(help="EUR, calls, tokens, or a unit of the policy.")]
Per = Annotated[Period, typer.Option(help="Which window; the present one is meant.")]


@app.command("show")
def show_budgets(
    scope: Annotated[BudgetScope | None, typer.Option(help="Only budgets of this scope.")] = None,
    subject: Annotated[str | None, typer.Option(help="With --scope: only the budgets of this name or id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 200,
    after: Annotated[str, typer.Option(help="Go on after this cursor, where a page ended.")] = "",
    as_json: AsJson = False,
) -> None:
    """Show the tenant's budgets and present windows, from narrow to wide.

    Status 0: shown, even if there is none; 1: refused; 2: wrong arguments; 3: no address, or no usable token.
    """
    if subject is not None and scope is None:
        fail(ExitCode.USAGE, "--subject says whose budgets of a scope; give --scope too")
    of = _key(scope, subject, "").scope_id if scope is not None and subject is not None else None
    cursor = _cursor(after)

    async def work(books: Books, caller: Caller) -> list[Budget]:
        budgets = books.storage.budgets
        return list(await budgets.list(caller.tenant_id, limit=limit + 1, after=cursor, scope=scope, scope_id=of))

    found = as_caller(work, as_json=as_json)
    budgets = found[:limit]
    following = budgets[-1].key.encode() if len(found) > limit else None
    lines = "\n".join(map(one_line, map(_line, budgets))) or "there is no budget"
    show({"items": [asdict(each) for each in budgets], "next": following}, lines, as_json=as_json)
    if following is not None and not as_json:
        typer.echo(f"more follow: --after {following}", err=True)


@app.command("set")
def set_limit(
    scope: Scope,
    subject: Subject,
    unit: Unit,
    amount: Annotated[str, typer.Argument(help="The limit, from 0 up.")],
    policy: PolicyFile,
    per: Per = Period.TOTAL,
    as_json: AsJson = False,
) -> None:
    """Set a limit; it holds for this window and all later ones, in place of the policy's. Needs plm.budgets.

    The policy in force has to count what is limited. Status 0: set; 1: refused; 2: wrong arguments; 3: no address,
    policy or token.
    """
    key, limit, snapshot = _key(scope, subject, unit, per), _amount(amount), policy_of(policy)

    async def work(books: Books, caller: Caller) -> Budget:
        desk = BudgetDesk(books.storage.budgets)
        plan = (await policy_in_force(books, snapshot)).budget_plan
        return await desk.set_limit(caller.tenant_id, key, limit, plan=plan, by=caller.principal)

    _show_one(as_caller(work, as_json=as_json), as_json=as_json)


@app.command("correct", context_settings={"ignore_unknown_options": True})
def correct(
    scope: Scope,
    subject: Subject,
    unit: Unit,
    amount: Annotated[str, typer.Argument(help="What is added to the spent amount; less than 0 gives back.")],
    reason: Annotated[str, typer.Option(help="Why; it is recorded.")],
    command_id: Annotated[str, typer.Option("--id", help="Names this correction, so that it is booked once.")],
    per: Per = Period.TOTAL,
    as_json: AsJson = False,
) -> None:
    """Correct what was spent by a counter-entry; nothing is overwritten. Needs plm.budgets.

    Status 0: booked, now or before; 1: refused; 2: wrong arguments; 3: no address, or no usable token.
    """
    key, change = _key(scope, subject, unit, per), _amount(amount)

    async def work(books: Books, caller: Caller) -> Budget:
        desk = BudgetDesk(books.storage.budgets)
        return await desk.correct(
            caller.tenant_id, key, change, reason=reason, command_id=command_id, by=caller.principal
        )

    _show_one(as_caller(work, as_json=as_json), as_json=as_json)


def _key(scope: BudgetScope, subject: str, unit: str, per: Period = Period.TOTAL) -> BudgetKey:
    try:
        return BudgetKey.of(scope, subject, unit, per)
    except InvalidRequest as error:
        fail(ExitCode.USAGE, str(error))


def _cursor(after: str) -> BudgetKey | None:
    try:
        return BudgetKey.decode(after) if after else None
    except InvalidRequest as error:
        fail(ExitCode.USAGE, str(error))


def _amount(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        fail(ExitCode.USAGE, f"{text!r} is no number")


def _show_one(budget: Budget, *, as_json: bool) -> None:
    document: dict[str, Any] = asdict(budget)
    show(document, _line(budget), as_json=as_json)


def _line(budget: Budget) -> str:
    whose = budget.subject or budget.scope_id
    window = ""
    if budget.ends_at is not None:
        window = f" this {budget.period.value} until {budget.ends_at:%Y-%m-%d %H:%M:%S} UTC"
        window += f" ({budget.time_zone})" if budget.time_zone != "UTC" else ""
    pinned = ", set by an operator" if budget.pinned else ""
    spent, reserved, limit = (f"{each.normalize():f}" for each in (budget.spent, budget.reserved, budget.limit))
    used = f"{spent} spent and {reserved} reserved of {limit} {budget.unit}"
    return f"{budget.scope.value} {whose}: {used}{window}{pinned}"
