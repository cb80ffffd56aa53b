"""``plm-cli agents`` and ``plm-cli capabilities``: what is registered, and how an agent stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plm_engine_core.cli.caller import Caller, as_caller
from plm_engine_core.cli.exits import loaded
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.cli.storage import Books, refused
from plm_engine_core.control_plane.agents import AgentDesk, StandingAgent
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.halts import CANCEL_SECONDS, KillSwitch
from plm_engine_core.control_plane.policy import load_policy
from plm_engine_core.control_plane.policy.lint import require_known_names
from plm_engine_core.control_plane.registry import AgentRegistry, changes, load_agents, load_capabilities
from plm_engine_core.control_plane.vocabulary import AgentStatus

agents_app = typer.Typer(
    help="Look at registered agents, suspend them and let them work again, as the bearer of PLM_TOKEN.",
    no_args_is_help=True,
)
capabilities_app = typer.Typer(help="Look at registered capabilities.", no_args_is_help=True)

Register = Annotated[
    Path, typer.Option("--register", help="The register of agents.", envvar="PLM_AGENT_REGISTER", show_default=False)
]
Agent = Annotated[str, typer.Argument(help="The agent, by its id in the register.", show_default=False)]
CancelSeconds = Annotated[
    float, typer.Option(min=1, help="The bound within which run workers end calls in flight, as they are set up.")
]


@capabilities_app.command("list")
def list_capabilities(
    capabilities: Annotated[
        Path, typer.Option(help="The capability file.", envvar="PLM_CAPABILITIES", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """List every version of every capability, with the life of each.

    Status 0: listed; 2: wrong arguments; 3: no file, or one that cannot be read.
    """
    versions = loaded(load_capabilities, capabilities).versions
    lines = [
        f"{each.id} {each.version}  {each.status.value}  {each.mode.value}  {each.description}" for each in versions
    ]
    items = [each.model_dump(mode="json") for each in versions]
    show({"items": items}, "\n".join(lines) or "none is registered", as_json=as_json)


@capabilities_app.command("check")
def check_capabilities(
    file: Annotated[Path, typer.Argument(help="The capability file that is to be tried.", show_default=False)],
    capabilities: Annotated[
        Path | None, typer.Option(help="The one that is in use, to be compared with.", envvar="PLM_CAPABILITIES")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A policy that has to go with it.", envvar="PLM_POLICY", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a capability file can be used, and what it would change. Nothing is done.

    Plans, plugins and the policy that was activated are asked by the node that reloads the file.

    Status 0: it can be used; 1: it cannot, and the sentence says why; 2: wrong arguments.
    """
    try:
        registry = load_capabilities(file)
        if policy is not None:
            require_known_names(load_policy(policy), registry, source=policy)
        made = changes(load_capabilities(capabilities), registry) if capabilities is not None else None
    except InvalidRequest as error:
        refused(error, as_json=as_json)
    words = "it can be used" if made is None else "\n".join(made.lines) or str(made)
    show({"changes": made.to_json() if made is not None else None}, words, as_json=as_json)


@agents_app.command("list")
def list_agents(register: Register, as_json: AsJson = False) -> None:
    """List every version of every registered agent, as it stands in the tenant.

    Status 0: listed; 1: refused; 2: wrong arguments; 3: no address, register or usable token.
    """
    agents = loaded(load_agents, register)

    async def work(books: Books, caller: Caller) -> list[StandingAgent]:
        return list(await _desk(books, agents).list(caller.tenant_id))

    found = as_caller(work, as_json=as_json)
    show({"items": [_document(each) for each in found]}, "\n".join(map(_line, found)) or "none", as_json=as_json)


@agents_app.command("suspend")
def suspend(
    agent: Agent,
    register: Register,
    reason: Annotated[str, typer.Option(help="Why; everyone it stops will read it.")],
    cancel_seconds: CancelSeconds = CANCEL_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Suspend an agent in the tenant: its runs are parked and its calls cancelled. Needs plm.halt.

    Status 0: it is suspended; 1: refused; 2: wrong arguments; 3: no address, register or usable token.
    """
    _set(agent, AgentStatus.SUSPENDED, register, reason, cancel_seconds, as_json=as_json)


@agents_app.command("resume")
def resume(agent: Agent, register: Register, as_json: AsJson = False) -> None:
    """Let a suspended agent work again; its parked runs go on. Needs plm.halt.

    Status 0: it may work; 1: refused; 2: wrong arguments; 3: no address, register or usable token.
    """
    _set(agent, AgentStatus.ACTIVE, register, "", CANCEL_SECONDS, as_json=as_json)


def _set(agent: str, status: AgentStatus, register: Path, reason: str, cancel_seconds: float, *, as_json: bool) -> None:
    agents = loaded(load_agents, register)

    async def work(books: Books, caller: Caller) -> StandingAgent:
        desk = _desk(books, agents, cancel_seconds=cancel_seconds)
        return await desk.set_status(caller.tenant_id, agent, status, reason=reason, by=caller.principal)

    made = as_caller(work, as_json=as_json)
    show(_document(made), _line(made), as_json=as_json)


def _desk(books: Books, agents: AgentRegistry, *, cancel_seconds: float = CANCEL_SECONDS) -> AgentDesk:
    halts = books.storage.halts
    switch = KillSwitch(halts, agents=agents, signals=books.signals, cancel_seconds=cancel_seconds)
    return AgentDesk(halts, agents=agents, kill_switch=switch)


def _document(each: StandingAgent) -> dict[str, Any]:
    registered = each.descriptor.model_dump(mode="json")
    halt_id = each.halt.id if each.halt is not None else None
    return {**registered, "status": each.status.value, "registered_status": registered["status"], "halt_id": halt_id}


def _line(each: StandingAgent) -> str:
    why = f" ({each.halt.reason})" if each.halt is not None else ""
    agent = each.descriptor
    return f"{agent.id} {agent.version}  {each.status.value}{why}  owner {agent.owner}, autonomy {agent.autonomy.value}"
