"""Who says that a token is good: the port, and the provider for shared HS256 secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, Protocol, Self

import jwt

from plm_engine_core.control_plane.identity.claims import read_claims
from plm_engine_core.control_plane.identity.context import IdentityContext
from plm_engine_core.control_plane.identity.errors import (
    IdentityInvalidSignatureError,
    IdentityMalformedError,
    IdentityProviderConfigError,
    RejectReason,
)
from plm_engine_core.control_plane.identity.secret_strength import MIN_SECRET_BYTES, weakness
from plm_engine_core.control_plane.identity.tokens import (
    check_standing,
    checked_leeway,
    leeway_of,
    read_header,
    signed_payload,
)

SHARED_SECRET_ENVIRONMENTS: Final = ("development", "dev", "local", "test", "ci")
"""Where `ENVIRONMENT` lets shared secrets be used, compared without case and blanks; every other name is production."""

_ALGORITHM: Final = "HS256"
_SECRET: Final = "PLM_IDENTITY_HS256_SECRET"  # noqa: S105 - a variable's name


class IdentityProvider(Protocol):
    """Turns a bearer token into an identity. Other providers take its place without a change elsewhere."""

    @property
    def name(self) -> str:
        """What the audit log calls this provider."""

    def validate(self, token: str) -> IdentityContext:
        """The identity that a token establishes, by the keys at hand; it never answers None and raises nothing else.

        Raises:
            IdentityValidationError: the token is refused; the subclass and its `reason` say why.
            IdentityProviderUnavailable: no keys are at hand.
        """

    async def identify(self, token: str) -> IdentityContext:
        """Like `validate`, after fetching the keys that it needs, in bounded time; what the middleware calls.

        Raises:
            IdentityValidationError: the token is refused.
            IdentityProviderUnavailable: the keys could not be fetched.
        """


class Hs256JwtIdentityProvider:
    """JSON Web Tokens signed with a secret that issuer and platform share: for development and closed networks.

    Signs with the active secret; validates with the active and the previous one, so that a secret can be replaced
    without a moment in which good tokens fail. `iss` is compared when an issuer is configured; a token with `aud` is
    accepted only when that audience is. The clocks may be `leeway_seconds` apart.

    Raises:
        IdentityProviderConfigError: the leeway is out of bounds, a secret is shorter than 32 bytes or plainly not
            random (RFC 8725, section 3.5), the mode is not ``hs256``, or the environment is none of
            `SHARED_SECRET_ENVIRONMENTS`: whoever may validate a shared secret may also forge.
    """

    name = "hs256"

    def __init__(
        self,
        *,
        active_secret: str,
        previous_secret: str | None = None,
        identity_provider_mode: str = "hs256",
        environment: str = "development",
        issuer: str | None = None,
        audience: str | None = None,
        leeway_seconds: float = 0.0,
    ) -> None:
        if identity_provider_mode.strip().casefold() != self.name:
            raise IdentityProviderConfigError(
                f"IDENTITY_PROVIDER_MODE is {identity_provider_mode!r}; the providers are 'hs256' and 'oidc'"
            )
        if environment.strip().casefold() not in SHARED_SECRET_ENVIRONMENTS:
            raise IdentityProviderConfigError(
                f"the hs256 provider does not start with ENVIRONMENT={environment.strip()[:100]}, which counts as "
                f"production: shared secrets are for {', '.join(SHARED_SECRET_ENVIRONMENTS)}; connect an "
                "OpenID Connect issuer with IDENTITY_PROVIDER_MODE=oidc"
            )
        self._secrets = [_checked(active_secret, "ACTIVE")]
        if previous_secret is not None:
            self._secrets.append(_checked(previous_secret, "PREVIOUS"))
        self._issuer = issuer
        self._audience = audience
        self._leeway = checked_leeway(leeway_seconds, given=leeway_seconds)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The provider that the environment describes; an empty variable counts as unset.

        ``PLM_IDENTITY_HS256_SECRET_ACTIVE`` (or the older ``PLM_IDENTITY_HS256_SECRET``), ``…_PREVIOUS``,
        ``IDENTITY_PROVIDER_MODE``, ``ENVIRONMENT``, ``PLM_IDENTITY_ISSUER``, ``PLM_IDENTITY_AUDIENCE``,
        ``PLM_IDENTITY_LEEWAY_SECONDS`` (0).

        Raises:
            IdentityProviderConfigError: no secret is set, or a setting is refused; no secret is ever repeated.
        """
        active = environ.get(f"{_SECRET}_ACTIVE") or environ.get(_SECRET)
        if not active:
            raise IdentityProviderConfigError(
                f"{_SECRET}_ACTIVE is not set; set it to at least {MIN_SECRET_BYTES} random bytes"
            )
        return cls(
            active_secret=active,
            previous_secret=environ.get(f"{_SECRET}_PREVIOUS") or None,
            identity_provider_mode=environ.get("IDENTITY_PROVIDER_MODE") or "hs256",
            environment=environ.get("ENVIRONMENT") or "development",
            issuer=environ.get("PLM_IDENTITY_ISSUER") or None,
            audience=environ.get("PLM_IDENTITY_AUDIENCE") or None,
            leeway_seconds=leeway_of(environ, default=0.0),
        )

    def validate(self, token: str) -> IdentityContext:
        """See `IdentityProvider.validate`; beyond a few kilobytes a token is refused unread."""
        secret, payload = self._verified(token)
        claims = read_claims(payload)
        check_standing(
            token,
            secret,
            _ALGORITHM,
            issuer=self._issuer,
            audience=self._audience,
            leeway_seconds=self._leeway,
            tenant_id=claims.tenant_id,
        )
        return claims.identity()

    async def identify(self, token: str) -> IdentityContext:
        """See `IdentityProvider.identify`; nothing has to be fetched."""
        return self.validate(token)

    def issue_token(self, claims: Mapping[str, Any]) -> str:
        """Sign claims with the active secret; `iss` and `aud` are added when configured and absent.

        Raises:
            IdentityValidationError: `validate` would refuse the token, so it is not handed out.
        """
        own = {"iss": self._issuer, "aud": self._audience}
        payload = {name: value for name, value in own.items() if value is not None} | dict(claims)
        try:
            token = jwt.encode(payload, self._secrets[0], _ALGORITHM)
        except (TypeError, ValueError):
            raise IdentityMalformedError(
                "a claim is no value that JSON has", reason=RejectReason.INVALID_CLAIM
            ) from None
        self.validate(token)
        return token

    def _verified(self, token: str) -> tuple[bytes, dict[str, Any]]:
        read_header(token, algorithms=(_ALGORITHM,))
        for secret in self._secrets:
            payload = signed_payload(token, secret, _ALGORITHM)
            if payload is not None:
                return secret, payload
        raise IdentityInvalidSignatureError


def _checked(secret: str, which: str) -> bytes:
    reason = weakness(secret)
    if reason is not None:
        raise IdentityProviderConfigError(
            f"{_SECRET}_{which} {reason}; it needs at least {MIN_SECRET_BYTES} random bytes, for example from "
            "`openssl rand -hex 32`"
        )
    return secret.encode()
