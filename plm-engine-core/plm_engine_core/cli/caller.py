"""The person at the terminal: commands that decide something act as the bearer of a token, never as the platform.

The token stands in ``PLM_TOKEN``, where other users cannot read it as they can an argument; it is checked like one of a
request, and the audit record is written first, of one that is refused too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar
from uuid import UUID

import typer

from plm_engine_core.cli.exits import ExitCode, fail, loaded
from plm_engine_core.cli.output import show_refusal
from plm_engine_core.cli.storage import Books, recording, with_books
from plm_engine_core.cli.tokens import bare, configured_provider
from plm_engine_core.control_plane.admission.proposal import Principal
from plm_engine_core.control_plane.errors import InvalidRequest, PolicyMissing
from plm_engine_core.control_plane.identity import (
    AuditError,
    AuditSink,
    AuditTenantUnknown,
    IdentityContext,
    IdentityMalformedError,
    IdentityProvider,
    IdentityProviderUnavailable,
    IdentityValidationError,
    RejectReason,
    identity_bound,
)
from plm_engine_core.control_plane.identity.audit import Surface, bind_record
from plm_engine_core.control_plane.identity.refusals import Refusals
from plm_engine_core.control_plane.policy import PolicySnapshot, load_policy, read_policy

PolicyFile = Annotated[
    Path,
    typer.Option("--policy", help="The policy file; counts until one is activated.", envvar="PLM_POLICY"),
]

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who acts, in which tenant."""

    tenant_id: UUID
    principal: Principal


def as_caller(work: Callable[[Books, Caller], Awaitable[Answer]], *, as_json: bool) -> Answer:
    """Run `work` as the bearer of the token; a refusal ends the command as `with_books` does."""
    token = bare(os.environ.get("PLM_TOKEN", ""))
    if not token:
        fail(
            ExitCode.NOT_CONFIGURED, "set PLM_TOKEN to your token; `plm-cli auth issue-token` makes one for development"
        )
    provider, required = configured_provider(), recording()

    async def acting(books: Books) -> Answer:
        try:
            identity = await _bound(token, provider, books.audit, required=required)
        except IdentityValidationError as error:
            show_refusal(error.code, error.reason, str(error), as_json=as_json)
            fail(ExitCode.NOT_CONFIGURED, f"PLM_TOKEN is refused: {error} [{error.code}]")
        except IdentityProviderUnavailable as error:
            show_refusal(error.code, error.code, str(error), as_json=as_json)
            fail(ExitCode.FAILED, f"PLM_TOKEN cannot be checked: {error} [{error.code}]")
        caller = Caller(
            tenant_id=identity.tenant_id,
            principal=Principal(
                user_id=identity.user_id, actor_kind=str(identity.actor_kind), scopes=frozenset(identity.scopes)
            ),
        )
        with identity_bound(identity):
            return await work(books, caller)

    return with_books(acting, as_json=as_json)


async def _bound(token: str, provider: IdentityProvider, audit: AuditSink, *, required: bool) -> IdentityContext:
    """The bearer, who is in the audit log by now; so is a token that is refused.

    Raises:
        IdentityValidationError: the token is refused.
        IdentityProviderUnavailable: it cannot be checked.
        AuditUnavailable: the record is `required` and not written.
    """
    refusals = Refusals(audit, provider=provider.name, unrecorded=partial(_unrecorded, "identity.reject"))
    try:
        identity = await provider.identify(token)
        try:
            await audit.write(bind_record(identity, provider=provider.name, surface=Surface.CLI))
        except AuditTenantUnknown:
            raise IdentityMalformedError(
                "the token's tenant does not exist", reason=RejectReason.UNKNOWN_TENANT
            ) from None
        except AuditError as error:
            if required:
                raise
            _unrecorded("identity.bind", identity.tenant_id, error)
    except IdentityValidationError as error:
        await refusals.record(error, client=Surface.CLI.value, surface=Surface.CLI)
        raise
    return identity


def _unrecorded(event: str, tenant_id: UUID | None, error: AuditError) -> None:
    whose = f"tenant {tenant_id}" if tenant_id is not None else "the installation"
    print(f"{event} of {whose} is not in the audit log: {error}", file=sys.stderr)


def policy_of(path: Path) -> PolicySnapshot:
    """The policy file; one that cannot be read ends the command."""
    return loaded(load_policy, path)


async def policy_in_force(books: Books, file: PolicySnapshot) -> PolicySnapshot:
    """The activated policy, or while none was activated that of the file.

    Raises:
        PolicyMissing: the activated one cannot be read by this release.
    """
    active = (await books.storage.policies.standing()).digests[0]
    if active is None:
        return file
    try:
        policy = read_policy(await books.storage.policies.content(active), source=f"policy {active[:12]}")
    except InvalidRequest as error:
        raise PolicyMissing(f"the activated policy cannot be read: {error}") from error
    if policy.digest != active:
        raise PolicyMissing(f"policy {active[:12]} reads as policy {policy.digest[:12]} in this release")
    return policy
