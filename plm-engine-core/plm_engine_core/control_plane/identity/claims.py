"""The claims of our tokens, checked strictly: nothing is converted, split or guessed (RFC 7519, RFC 8725)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from plm_engine_core.control_plane.identity.context import ActorKind, IdentityContext
from plm_engine_core.control_plane.identity.errors import IdentityMalformedError, RejectReason
from plm_engine_core.control_plane.oauth_scopes import OAuthScope

MAX_LIFETIME_SECONDS = 86_400
REQUIRED_CLAIMS = ("sub", "tenant_id", "actor_kind", "scopes", "exp", "iat")

_YEAR_9999 = 253_402_300_799
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)  # RFC 9562, section 4


def _uuid_text(value: object) -> UUID:
    if not isinstance(value, str) or _UUID.fullmatch(value) is None:
        raise ValueError("must be a UUID as text")
    return UUID(value)


def _actor_kind(value: object) -> ActorKind:
    if not isinstance(value, str):
        raise ValueError("must be text")  # noqa: TRY004 - pydantic turns only ValueError into its own
    return ActorKind(value)


UuidText = Annotated[UUID, BeforeValidator(_uuid_text)]
NumericDate = Annotated[float, Field(ge=0, le=_YEAR_9999, allow_inf_nan=False)]


class Claims(BaseModel):
    """What a token must carry; claims that are not ours are ignored (RFC 7519, section 4)."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    sub: UuidText
    tenant_id: UuidText
    actor_kind: Annotated[ActorKind, BeforeValidator(_actor_kind)]
    scopes: list[OAuthScope]
    exp: NumericDate
    iat: NumericDate
    nbf: NumericDate | None = None
    session_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,256}$")] | None = None

    def identity(self) -> IdentityContext:
        """The identity that these claims establish once the token is verified."""
        return IdentityContext(
            user_id=self.sub,
            tenant_id=self.tenant_id,
            actor_kind=self.actor_kind,
            scopes=frozenset(self.scopes),
            session_id=self.session_id,
            issued_at=datetime.fromtimestamp(self.iat, UTC),
            expires_at=datetime.fromtimestamp(self.exp, UTC),
        )


def verified_tenant(payload: Mapping[str, Any]) -> UUID | None:
    """The tenant of a payload whose signature was verified, or None where it names none."""
    try:
        return _uuid_text(payload.get("tenant_id"))
    except ValueError:
        return None


def read_claims(payload: Mapping[str, Any]) -> Claims:
    """Check the claims of a payload whose signature was verified; times are not compared with the clock here.

    Raises:
        IdentityMalformedError: a claim is missing or wrong, or the token is made to live longer than a day.
    """
    tenant = verified_tenant(payload)
    missing = [name for name in REQUIRED_CLAIMS if payload.get(name) is None]
    if missing:
        raise IdentityMalformedError(
            f"the token lacks the claim {missing[0]!r}", reason=RejectReason.MISSING_CLAIM, tenant_id=tenant
        )
    try:
        claims = Claims.model_validate(dict(payload))
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_input=False, include_context=False)[0]["loc"][0])
        reason = RejectReason.INVALID_ACTOR_KIND if name == "actor_kind" else RejectReason.INVALID_CLAIM
        raise IdentityMalformedError(
            f"the token's claim {name!r} has a wrong form", reason=reason, tenant_id=tenant
        ) from None
    if not 0 < claims.exp - claims.iat <= MAX_LIFETIME_SECONDS:
        raise IdentityMalformedError(
            f"the token must live more than 0 and at most {MAX_LIFETIME_SECONDS} seconds from `iat` to `exp`",
            reason=RejectReason.MAX_LIFETIME_EXCEEDED,
            tenant_id=tenant,
        )
    return claims
