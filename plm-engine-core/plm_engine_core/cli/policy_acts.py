"""``plm-cli policy activate``, ``active`` and ``shadow``: which policy decides, and which one only watches."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from plm_engine_core.cli.caller import Caller, as_caller
from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.cli.storage import Books, refused, with_books
from plm_engine_core.control_plane.activation import Activation, PolicyDesk
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.in_force import LOOK_EVERY_SECONDS
from plm_engine_core.control_plane.policy import load_policy
from plm_engine_core.control_plane.policy.shadow import ShadowReport
from plm_engine_core.control_plane.registry import load_capabilities
from plm_engine_core.control_plane.vocabulary import PolicyRole

shadow_app = typer.Typer(help="Try a policy beside the one that decides.", no_args_is_help=True)

PolicyFile = Annotated[Path, typer.Argument(help="The policy, YAML or JSON.", show_default=False)]
CapabilityFile = Annotated[Path, typer.Option("--capabilities", help="The capability file.", envvar="PLM_CAPABILITIES")]
Reason = Annotated[str, typer.Option(help="Why; it stands in the record for good.")]


def activate(
    policy: PolicyFile,
    capabilities: CapabilityFile,
    reason: Reason,
    previous: Annotated[str | None, typer.Option(help="The digest of the activated policy it replaces.")] = None,
    first: Annotated[bool, typer.Option("--first", help="Instead: none was ever activated.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a policy in force, for all tenants and every running process.

    Who does it is the token in PLM_TOKEN: a human with the OAuth scope plm.policy.activate.
    Status 0: it decides from now on; 1: refused; 2: wrong arguments; 3: no address or token.
    """
    if first == (previous is not None):
        fail(
            ExitCode.USAGE, "say --previous DIGEST, which `plm-cli policy active` shows, or --first when there is none"
        )
    made = _act(policy, capabilities, PolicyRole.ACTIVE, reason=reason, previous=previous, as_json=as_json)
    text = (
        f"policy {made.digest} (version {made.version}) decides; every process has it within {LOOK_EVERY_SECONDS:g} s"
    )
    show(_described(made), text, as_json=as_json)


def active(as_json: AsJson = False) -> None:
    """Say which policy decides and which one is its shadow.

    Status 0: said; 1: the database refused; 3: no address.
    """
    standing = with_books(lambda books: books.storage.policies.standing(), as_json=as_json)
    answer = {"active": _or_none(standing.active), "shadow": _or_none(standing.shadow)}
    lines = [
        _line("active", standing.active, "none was activated: each process decides by its policy file"),
        _line("shadow", standing.shadow, "none"),
    ]
    show(answer, "\n".join(lines), as_json=as_json)


@shadow_app.command("start")
def start(policy: PolicyFile, capabilities: CapabilityFile, reason: Reason, as_json: AsJson = False) -> None:
    """Have a policy decide beside the active one, without effect, in place of the shadow there may be.

    Needs what `activate` needs. Status 0: it watches; 1: refused; 2: wrong arguments; 3: no address or token.
    """
    made = _act(policy, capabilities, PolicyRole.SHADOW, reason=reason, as_json=as_json)
    show(_described(made), f"policy {made.digest} (version {made.version}) is the shadow", as_json=as_json)


@shadow_app.command("stop")
def stop(capabilities: CapabilityFile, reason: Reason, as_json: AsJson = False) -> None:
    """End the shadow; what it recorded stays.

    Needs what `activate` needs. Status 0: there is none; 1: refused; 2: wrong arguments; 3: no address or token.
    """
    made = _act(None, capabilities, PolicyRole.SHADOW, reason=reason, as_json=as_json)
    show(_described(made), "there is no shadow", as_json=as_json)


@shadow_app.command("report")
def report(
    tenant_id: Annotated[UUID, typer.Option(help="Whose proposals.")],
    digest: Annotated[str | None, typer.Option(help="Of which shadow; by default the one that watches now.")] = None,
    days: Annotated[float, typer.Option(min=0.0, max=36_500.0, help="Of the last how many days.")] = 7.0,
    as_json: AsJson = False,
) -> None:
    """Say what the shadow would have decided otherwise.

    Status 0: said; 1: there is no such shadow or tenant, or the database refused; 2: wrong arguments; 3: no address.
    """
    since = datetime.now(UTC) - timedelta(days=days)
    made = with_books(lambda books: _report(books, tenant_id, digest, since), of=tenant_id, as_json=as_json)
    lines = [f"{made.compared} proposals seen by {made.digest}, {made.changed} decided otherwise"]
    lines += [f"  {made.unreadable} records cannot be read"] if made.unreadable else []
    lines += [f"  {count} x {before} -> {after}" for (before, after), count in sorted(made.outcomes.items())]
    lines += [
        f"  run {each.attempt.run_id} step {each.attempt.step_index} {each.attempt.capability} "
        f"({each.before} -> {each.after}): {each.rule or each.message}"
        for each in made.examples
    ]
    show({"tenant_id": tenant_id, **made.to_json()}, "\n".join(lines), as_json=as_json)


async def _report(books: Books, tenant_id: UUID, digest: str | None, since: datetime) -> ShadowReport:
    if digest is not None:
        await books.storage.policies.content(digest)  # what a slip of the pen names saw nothing
    else:
        digest = (await books.storage.policies.standing()).digests[1]
    if digest is None:
        raise InvalidRequest("there is no shadow; name an earlier one with --digest", field="digest")
    made = ShadowReport(digest=digest)
    async for batch in books.storage.runs.attempts(tenant_id, since=since):
        made.feed(batch)
    return made


def _act(
    file: Path | None,
    capabilities: Path,
    role: PolicyRole,
    *,
    reason: str,
    previous: str | None = None,
    as_json: bool,
) -> Activation:
    evaluators = EvaluatorRegistry.installed()
    try:
        policy = load_policy(file) if file is not None else None
        registry = load_capabilities(capabilities)
        if file is not None and policy is not None:
            evaluators.build(policy, file=file)  # which says where it stands, where one of them is wrong
    except InvalidRequest as error:
        refused(error, as_json=as_json)

    async def work(books: Books, caller: Caller) -> Activation:
        policies = books.storage.policies
        # A shadow decides nothing, so the newest word counts.
        replaced = (await policies.standing()).digests[1] if role is PolicyRole.SHADOW else previous
        desk = PolicyDesk(policies, registry=registry, evaluators=evaluators)
        return await desk.activate(
            caller.tenant_id, policy, role=role, previous=replaced, reason=reason, by=caller.principal
        )

    return as_caller(work, as_json=as_json)


def _described(made: Activation) -> dict[str, Any]:
    """An activation as JSON values."""
    return {**vars(made), "role": made.role.value, "activated_at": made.activated_at.isoformat()}


def _or_none(made: Activation | None) -> dict[str, Any] | None:
    return _described(made) if made is not None and made.digest is not None else None


def _line(role: str, made: Activation | None, otherwise: str) -> str:
    if made is None or made.digest is None:
        return f"{role}: {otherwise}"
    return (
        f"{role}: {made.digest} (version {made.version}), since {made.activated_at:%Y-%m-%d %H:%M:%S} UTC "
        f"by {made.activated_by}: {made.reason}"
    )
