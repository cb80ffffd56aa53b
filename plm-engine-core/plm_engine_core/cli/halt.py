"""``plm-cli halt``: stop what must not go on, and lift that again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from plm_engine_core.cli.caller import Caller, as_caller
from plm_engine_core.cli.exits import ExitCode, fail, loaded
from plm_engine_core.cli.output import AsJson, one_line, show
from plm_engine_core.cli.storage import Books
from plm_engine_core.control_plane.halts import CANCEL_SECONDS, LONGEST_CANCEL_SECONDS, Halt, HaltDrill, KillSwitch
from plm_engine_core.control_plane.registry import CapabilityRegistry, load_agents, load_capabilities
from plm_engine_core.control_plane.vocabulary import HaltScope

app = typer.Typer(help="Stop what must not go on, as the bearer of PLM_TOKEN.", no_args_is_help=True)


Scope = Annotated[HaltScope, typer.Argument(help="What to stop.", show_default=False)]
Run = Annotated[UUID | None, typer.Option(help="The run of a run halt.")]
RunGroup = Annotated[UUID | None, typer.Option(help="The run group of its halt.")]
Agent = Annotated[str | None, typer.Option(help="The agent of its halt.")]
Capability = Annotated[str | None, typer.Option(help="The capability of its halt.")]
Capabilities = Annotated[
    Path | None, typer.Option(help="The capability file, for a capability halt.", envvar="PLM_CAPABILITIES")
]
Register = Annotated[
    Path | None,
    typer.Option(help="The register of agents, for the halt of one that never ran.", envvar="PLM_AGENT_REGISTER"),
]


@app.command("trigger")
def trigger(
    scope: Scope,
    reason: Annotated[str, typer.Option(help="Why; everyone it stops will read it.")],
    run: Run = None,
    run_group: RunGroup = None,
    agent: Agent = None,
    capability: Capability = None,
    capabilities: Capabilities = None,
    register: Register = None,
    cancel_seconds: Annotated[
        float,
        typer.Option(
            min=1,
            max=LONGEST_CANCEL_SECONDS,
            help="The bound within which run workers end calls in flight, as they are set up.",
        ),
    ] = CANCEL_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Halt. When this ends, nothing begins in the scope until the halt is lifted; halting twice answers the same.

    Status 0: it stands; 1: refused, and the sentence ends with the reason in brackets; 2: wrong arguments; 3: no
    address, no capability file, no readable register, or no usable token.
    """
    switch_of = _switch(scope, run, run_group, agent, capability, capabilities, register, cancel_seconds)

    async def work(books: Books, caller: Caller) -> Halt:
        return await switch_of(books).trigger(
            caller.tenant_id, scope, run or run_group, subject=agent or capability, reason=reason, by=caller.principal
        )

    halt = as_caller(work, as_json=as_json)
    show(asdict(halt), f"halt {halt.id} stands ({_scope(halt)})", as_json=as_json)


@app.command("drill")
def drill(
    scope: Scope,
    run: Run = None,
    run_group: RunGroup = None,
    agent: Agent = None,
    capability: Capability = None,
    capabilities: Capabilities = None,
    register: Register = None,
    as_json: AsJson = False,
) -> None:
    """Say what a halt would stop in the tenant now, and stop nothing. Needs what the halt itself needs.

    Status 0: told; 1: refused, as the halt would be; 2: wrong arguments; 3: no address, no capability file, no readable
    register, or no usable token.
    """
    switch_of = _switch(scope, run, run_group, agent, capability, capabilities, register, CANCEL_SECONDS)

    async def work(books: Books, caller: Caller) -> HaltDrill:
        return await switch_of(books).drill(
            caller.tenant_id, scope, run or run_group, subject=agent or capability, by=caller.principal
        )

    told = as_caller(work, as_json=as_json)
    runs = ", ".join(f"{number} {state.value}" for state, number in sorted(told.runs.items())) or "none"
    calls = f"{told.grants} unused grants to revoke, {told.calls} calls in flight to cancel"
    show(asdict(told), one_line(f"{_scope(told)}: runs {runs}; {calls}"), as_json=as_json)


def _switch(
    scope: HaltScope,
    run: UUID | None,
    run_group: UUID | None,
    agent: str | None,
    capability: str | None,
    capabilities: Path | None,
    register: Path | None,
    cancel_seconds: float,
) -> Callable[[Books], KillSwitch]:
    """What makes the kill switch of some books; ends the command where the scope is not named as it must be."""
    named = {
        HaltScope.RUN: run,
        HaltScope.RUN_GROUP: run_group,
        HaltScope.AGENT: agent,
        HaltScope.CAPABILITY: capability,
    }
    for other, value in named.items():
        if (value is not None) != (other is scope):
            fail(
                ExitCode.USAGE,
                f"--{other.value.replace('_', '-')} names what a {other.value} halt stops, and no other's",
            )
    registry = _registry(capabilities) if scope is HaltScope.CAPABILITY else None
    agents = loaded(load_agents, register) if scope is HaltScope.AGENT and register is not None else None
    return lambda books: KillSwitch(
        books.storage.halts, registry=registry, agents=agents, signals=books.signals, cancel_seconds=cancel_seconds
    )


@app.command("list")
def list_halts(
    everything: Annotated[bool, typer.Option("--all", help="Also those that were lifted.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the halts over the tenant, those of the system included, the newest first.

    Status 0: listed, even if there is none; 1: refused; 2: wrong arguments; 3: no address, or no usable token.
    """

    async def work(books: Books, caller: Caller) -> list[Halt]:
        return list(await books.storage.halts.list(caller.tenant_id, limit=limit, before=None, standing=not everything))

    halts = as_caller(work, as_json=as_json)
    items: list[dict[str, Any]] = [asdict(each) for each in halts]
    show({"items": items}, "\n".join(map(one_line, map(_line, halts))) or "no halt stands", as_json=as_json)


@app.command("lift")
def lift(
    halt_id: Annotated[UUID, typer.Argument(help="The halt.", show_default=False)], as_json: AsJson = False
) -> None:
    """Lift a halt; the runs it parked go on. Lifting twice answers the same.

    Status 0: it is lifted; 1: refused; 2: wrong arguments; 3: no address, or no usable token.
    """

    async def work(books: Books, caller: Caller) -> Halt:
        return await KillSwitch(books.storage.halts).lift(caller.tenant_id, halt_id, by=caller.principal)

    halt = as_caller(work, as_json=as_json)
    show(asdict(halt), f"halt {halt.id} is lifted ({_scope(halt)})", as_json=as_json)


def _registry(path: Path | None) -> CapabilityRegistry:
    if path is None:
        fail(ExitCode.NOT_CONFIGURED, "set PLM_CAPABILITIES to the capability file, so that a slip of the pen is found")
    return loaded(load_capabilities, path)


def _scope(halt: Halt | HaltDrill) -> str:
    return " ".join(str(each) for each in (halt.scope.value, halt.subject or halt.scope_id) if each)


def _line(halt: Halt) -> str:
    calls = f"{halt.calls.open} of {halt.calls.in_flight} calls still open" if halt.calls.in_flight else "no calls met"
    lifted = "lifted" if halt.lifted_at else "stands"
    return f"{halt.id}  {lifted}  since {halt.triggered_at:%Y-%m-%d %H:%M:%S}  {_scope(halt)}: {halt.reason} ({calls})"
