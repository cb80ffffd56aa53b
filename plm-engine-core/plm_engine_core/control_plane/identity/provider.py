"""Who says that a token is good: the port, and the provider for shared HS256 secrets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, Protocol, Self

import jwt

from plm_engine_core.control_plane.identity.claims import read_claims, verified_tenant
from plm_engine_core.control_plane.identity.context import IdentityContext
from plm_engine_core.control_plane.identity.errors import (
    IdentityExpiredError,
    IdentityInvalidSignatureError,
    IdentityMalformedError,
    IdentityProviderConfigError,
    RejectReason,
)
from plm_engine_core.control_plane.identity.secret_strength import MIN_SECRET_BYTES, weakness

MAX_TOKEN_CHARS: Final = 8_192

_ALGORITHM: Final = "HS256"
_SECRET: Final = "PLM_IDENTITY_HS256_SECRET"  # noqa: S105 - a variable's name
_SIGNATURE_ONLY: Final = {f"verify_{part}": False for part in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")}
_REASONS: Final = (
    (jwt.InvalidAlgorithmError, RejectReason.UNSUPPORTED_ALGORITHM),
    (jwt.ImmatureSignatureError, RejectReason.NOT_YET_VALID),
    (jwt.InvalidAudienceError, RejectReason.WRONG_AUDIENCE),
    (jwt.InvalidIssuerError, RejectReason.WRONG_ISSUER),
    (jwt.MissingRequiredClaimError, RejectReason.MISSING_CLAIM),
)


class IdentityProvider(Protocol):
    """Turns a bearer token into an identity. Other providers take its place without a change elsewhere."""

    @property
    def name(self) -> str:
        """What the audit log calls this provider."""

    def validate(self, token: str) -> IdentityContext:
        """The identity that a token establishes; it never answers None and raises nothing else.

        Raises:
            IdentityValidationError: the token is refused; the subclass and its `reason` say why.
        """


class Hs256JwtIdentityProvider:
    """JSON Web Tokens signed with a secret that issuer and platform share: for development and closed networks.

    Signs with the active secret; validates with the active and the previous one, so that a secret can be replaced
    without a moment in which good tokens fail. `iss` is compared when an issuer is configured; a token with `aud` is
    accepted only when that audience is.

    Raises:
        IdentityProviderConfigError: a secret is shorter than 32 bytes or plainly not random (RFC 8725, section 3.5),
            the mode is not ``hs256``, or the environment is production: whoever may validate a shared secret may also
            forge.
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
    ) -> None:
        if identity_provider_mode.strip().casefold() != self.name:
            raise IdentityProviderConfigError(
                f"IDENTITY_PROVIDER_MODE is {identity_provider_mode!r}; the one provider so far is 'hs256'"
            )
        if environment.strip().casefold() in {"production", "prod"}:
            raise IdentityProviderConfigError(
                f"the hs256 provider does not start with ENVIRONMENT={environment.strip()}: shared secrets are not "
                "for production; configure another identity provider"
            )
        self._secrets = [_checked(active_secret, "ACTIVE")]
        if previous_secret is not None:
            self._secrets.append(_checked(previous_secret, "PREVIOUS"))
        self._issuer = issuer
        self._audience = audience

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The provider that the environment describes; an empty variable counts as unset.

        ``PLM_IDENTITY_HS256_SECRET_ACTIVE`` (or the older ``PLM_IDENTITY_HS256_SECRET``), ``…_PREVIOUS``,
        ``IDENTITY_PROVIDER_MODE``, ``ENVIRONMENT``, ``PLM_IDENTITY_ISSUER``, ``PLM_IDENTITY_AUDIENCE``.

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
        )

    def validate(self, token: str) -> IdentityContext:
        """See `IdentityProvider.validate`; beyond a few kilobytes a token is refused unread."""
        secret, payload = self._verify_signature(token)
        claims = read_claims(payload)
        tenant = verified_tenant(payload)
        try:
            # PyJWT compares the clock, issuer and audience; it reads `exp` as int() would, so it comes after our check.
            jwt.decode(token, secret, [_ALGORITHM], issuer=self._issuer, audience=self._audience)
        except jwt.ExpiredSignatureError:
            raise IdentityExpiredError(tenant_id=tenant) from None
        except (jwt.PyJWTError, TypeError, ValueError) as error:
            raise IdentityMalformedError(
                f"the token is refused: {_plain(error)}", reason=_reason(error), tenant_id=tenant
            ) from None
        return claims.identity()

    def issue_token(self, claims: Mapping[str, Any]) -> str:
        """Sign claims with the active secret; `iss` and `aud` are added when configured and absent.

        Raises:
            IdentityValidationError: `validate` would refuse the token, so it is not handed out.
        """
        own = {"iss": self._issuer, "aud": self._audience}
        payload = {name: value for name, value in own.items() if value is not None} | dict(claims)
        token = jwt.encode(payload, self._secrets[0], _ALGORITHM)
        self.validate(token)
        return token

    def _verify_signature(self, token: str) -> tuple[bytes, dict[str, Any]]:
        _check_header(token)
        for secret in self._secrets:
            try:
                return secret, jwt.decode(token, secret, [_ALGORITHM], options=_SIGNATURE_ONLY)  # type: ignore[arg-type]
            except jwt.InvalidSignatureError:
                continue
            except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
                raise IdentityMalformedError(
                    "the token cannot be read as a signed JSON Web Token", reason=_reason(error)
                ) from None
        raise IdentityInvalidSignatureError


def _check_header(token: str) -> None:
    """Refuse what no key could make good, before a signature is computed.

    The algorithm is ours to choose, never the token's (RFC 8725, section 3.1); we understand no critical extension
    (RFC 7515, section 4.1.11); a token of another type is not an identity (RFC 8725, section 3.11).
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise IdentityMalformedError(
            f"the token is longer than {MAX_TOKEN_CHARS} characters", reason=RejectReason.MALFORMED_TOKEN
        )
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise IdentityMalformedError(
            "the token cannot be read as a JSON Web Token", reason=RejectReason.MALFORMED_TOKEN
        ) from None
    if header.get("alg") != _ALGORITHM:
        raise IdentityMalformedError(
            f"the token's algorithm is not {_ALGORITHM}", reason=RejectReason.UNSUPPORTED_ALGORITHM
        )
    kind = header.get("typ", "JWT")
    if "crit" in header or not (isinstance(kind, str) and kind.upper() == "JWT"):
        raise IdentityMalformedError("the token's header is not that of a JWT", reason=RejectReason.MALFORMED_TOKEN)


def _reason(error: Exception) -> RejectReason:
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return RejectReason.MALFORMED_TOKEN


def _plain(error: Exception) -> str:
    """A reason in words; PyJWT's own texts may repeat claims."""
    return _reason(error).value.replace("_", " ")


def _checked(secret: str, which: str) -> bytes:
    reason = weakness(secret)
    if reason is not None:
        raise IdentityProviderConfigError(
            f"{_SECRET}_{which} {reason}; it needs at least {MIN_SECRET_BYTES} random bytes, for example from "
            "`openssl rand -hex 32`"
        )
    return secret.encode()
