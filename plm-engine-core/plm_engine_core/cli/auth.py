"""``plm-cli auth``: tokens for development and closed networks, and what any token is worth here."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID, uuid4

import typer

from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import AsJson, show
from plm_engine_core.cli.tokens import configured_provider, identified, read_token
from plm_engine_core.control_plane.identity import (
    ActorKind,
    Hs256JwtIdentityProvider,
    IdentityValidationError,
)

app = typer.Typer(help="Issue and inspect identity tokens.", no_args_is_help=True)

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
_LONGEST = timedelta(days=1)


@app.command("issue-token")
def issue_token(
    tenant_id: Annotated[UUID, typer.Option(help="The tenant the token is good for.")],
    user_id: Annotated[UUID | None, typer.Option(help="The user; a new random one by default.")] = None,
    actor_kind: Annotated[ActorKind, typer.Option(help="What kind of caller it is.")] = ActorKind.HUMAN,
    scope: Annotated[list[str] | None, typer.Option(help="An OAuth scope; repeat for more.")] = None,
    ttl: Annotated[str, typer.Option(help="How long it lives: 90s, 15m, 1h; at most 24h.")] = "1h",
    session_id: Annotated[str | None, typer.Option(help="A session id to carry along.")] = None,
    allow_system: Annotated[bool, typer.Option("--allow-system", help="Permit --actor-kind system.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a signed bearer token.

    The secret comes from PLM_IDENTITY_HS256_SECRET_ACTIVE and is never an argument. Only the token goes to stdout.
    Status 0: printed, 2: wrong arguments, 3: no usable secret, or refused in production.
    """
    lifetime = parse_ttl(ttl)
    if actor_kind is ActorKind.SYSTEM and not allow_system:
        fail(ExitCode.USAGE, "--actor-kind system acts as the platform itself; add --allow-system to mean it")
    now = int(time.time())
    claims = {
        "sub": str(user_id or uuid4()),
        "tenant_id": str(tenant_id),
        "actor_kind": actor_kind.value,
        "scopes": sorted(set(scope or ())),
        "iat": now,
        "exp": now + int(lifetime.total_seconds()),
    }
    if session_id is not None:
        claims["session_id"] = session_id
    provider = configured_provider()
    if not isinstance(provider, Hs256JwtIdentityProvider):
        fail(ExitCode.NOT_CONFIGURED, f"tokens of the {provider.name} provider come from its issuer; get one there")
    try:
        token = provider.issue_token(claims)
    except IdentityValidationError as error:
        words = f"got --scope {sorted(set(scope or ()))!r:.200} and --session-id {session_id!r:.200}"
        fail(
            ExitCode.USAGE,
            f"no token was issued: {error}; a scope is 1 to 128 and a session id 1 to 256 visible ASCII characters "
            f"without blanks, and for a second scope the option is repeated; {words}",
        )
    expires_at = datetime.fromtimestamp(now, UTC) + lifetime
    typer.echo(
        f"{actor_kind} {claims['sub']} in tenant {tenant_id}, until {expires_at:%Y-%m-%d %H:%M:%S} UTC", err=True
    )
    show({"token": token, "claims": claims, "expires_at": expires_at.isoformat()}, token, as_json=as_json)


@app.command("inspect")
def inspect(as_json: AsJson = False) -> None:
    """Read a bearer token from standard input and say who it is, by the identity provider of this environment.

    A token is never an argument, where every process could read it; whether its tenant exists is not looked up.
    Status 0: the platform would let it in, 1: it would not, or its issuer cannot be reached, 2: no token was given,
    3: no usable provider.
    """
    token = read_token()
    if not token:
        fail(ExitCode.USAGE, "give the token on standard input: plm-cli auth inspect < token.txt")
    provider = configured_provider()
    identity = identified(provider, token, as_json=as_json)
    answer = {"provider": provider.name, **identity.model_dump(mode="json"), "scopes": sorted(identity.scopes)}
    lines = [f"{identity.actor_kind} {identity.user_id} in tenant {identity.tenant_id}, known by {provider.name}"]
    lines.append(
        f"until {identity.expires_at:%Y-%m-%d %H:%M:%S} UTC, issued {identity.issued_at:%Y-%m-%d %H:%M:%S} UTC"
    )
    lines.append(f"OAuth scopes: {' '.join(sorted(identity.scopes)) or 'none'}")
    show(answer, "\n".join(lines), as_json=as_json)


def parse_ttl(text: str) -> timedelta:
    """A lifetime such as ``90s``, ``15m`` or ``1h``; a bare number is seconds. Ends the command when it is no good."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    lifetime = timedelta(seconds=int(found[1]) * _SECONDS[found[2]]) if found else timedelta(0)
    if not timedelta(0) < lifetime <= _LONGEST:
        fail(ExitCode.USAGE, f"--ttl must be more than 0 and at most 24h, written as 90s, 15m or 1h; got {text!r}")
    return lifetime
