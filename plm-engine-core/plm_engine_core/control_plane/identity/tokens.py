"""Reading a signed JSON Web Token, for every provider alike: what comes is hostile, and every failure is typed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final
from uuid import UUID

import jwt

from plm_engine_core.control_plane.identity.errors import (
    IdentityExpiredError,
    IdentityMalformedError,
    IdentityProviderConfigError,
    RejectReason,
)

MAX_TOKEN_CHARS: Final = 8_192
MAX_LEEWAY_SECONDS: Final = 120.0

_SIGNATURE_ONLY: Final = {f"verify_{part}": False for part in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")}
_REASONS: Final = (
    (jwt.InvalidAlgorithmError, RejectReason.UNSUPPORTED_ALGORITHM),
    (jwt.ImmatureSignatureError, RejectReason.NOT_YET_VALID),
    (jwt.InvalidAudienceError, RejectReason.WRONG_AUDIENCE),
    (jwt.InvalidIssuerError, RejectReason.WRONG_ISSUER),
    (jwt.MissingRequiredClaimError, RejectReason.MISSING_CLAIM),
)
_UNREADABLE: Final = (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError)


def read_header(token: str, *, algorithms: Collection[str], types: Collection[str] = ("JWT",)) -> Mapping[str, Any]:
    """A token's header, once it asks for nothing that no key could make good; no signature is computed for it.

    The algorithm is ours to choose, never the token's (RFC 8725, section 3.1); we understand no critical extension
    (RFC 7515, section 4.1.11); a token of another type is not an identity (RFC 8725, section 3.11). `types` are in
    upper case; a token without a type counts as ``JWT``.

    Raises:
        IdentityMalformedError: it is refused.
    """
    if len(token) > MAX_TOKEN_CHARS:
        raise IdentityMalformedError(
            f"the token is longer than {MAX_TOKEN_CHARS} characters", reason=RejectReason.MALFORMED_TOKEN
        )
    try:
        header = jwt.get_unverified_header(token)
    except _UNREADABLE:
        raise IdentityMalformedError(
            "the token cannot be read as a JSON Web Token", reason=RejectReason.MALFORMED_TOKEN
        ) from None
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in algorithms:
        raise IdentityMalformedError(
            f"the token's algorithm is not {' or '.join(sorted(algorithms))}", reason=RejectReason.UNSUPPORTED_ALGORITHM
        )
    kind = header.get("typ", "JWT")
    if "crit" in header or not (isinstance(kind, str) and kind.upper().removeprefix("APPLICATION/") in types):
        raise IdentityMalformedError("the token's header is not that of a JWT", reason=RejectReason.MALFORMED_TOKEN)
    return header


def signed_payload(token: str, key: Any, algorithm: str) -> dict[str, Any] | None:
    """What the token says when `key` made its signature, else None; no claim is looked at.

    Raises:
        IdentityMalformedError: it cannot be read.
    """
    try:
        return jwt.decode(token, key, [algorithm], options=_SIGNATURE_ONLY)  # type: ignore[arg-type]
    except jwt.InvalidSignatureError:
        return None
    except _UNREADABLE as error:
        raise IdentityMalformedError(
            "the token cannot be read as a signed JSON Web Token", reason=_reason(error)
        ) from None


def check_standing(
    token: str,
    key: Any,
    algorithm: str,
    *,
    issuer: str | None,
    audience: str | None,
    leeway_seconds: float,
    tenant_id: UUID | None,
) -> None:
    """Compare a token of checked form with the clock, our issuer and our audience.

    PyJWT does; it reads times as int() would, so the claims' form has to be checked before. A token with `aud` is
    refused where no audience is configured (RFC 7519, section 4.1.3).

    Raises:
        IdentityExpiredError: it was good.
        IdentityMalformedError: it is not good yet, or not ours.
    """
    try:
        jwt.decode(token, key, [algorithm], issuer=issuer, audience=audience, leeway=leeway_seconds)
    except jwt.ExpiredSignatureError:
        raise IdentityExpiredError(tenant_id=tenant_id) from None
    except _UNREADABLE as error:
        # PyJWT's own texts may repeat claims.
        words = _reason(error).value.replace("_", " ")
        raise IdentityMalformedError(
            f"the token is refused: {words}", reason=_reason(error), tenant_id=tenant_id
        ) from None


def leeway_of(environ: Mapping[str, str], *, default: float) -> float:
    """How far apart the issuer's clock and ours may be, in seconds: ``PLM_IDENTITY_LEEWAY_SECONDS``.

    Raises:
        IdentityProviderConfigError: it is no number from 0 to 120.
    """
    text = environ.get("PLM_IDENTITY_LEEWAY_SECONDS") or str(default)
    try:
        leeway = float(text)
    except ValueError:
        leeway = -1.0
    return checked_leeway(leeway, given=text)


def checked_leeway(leeway: float, *, given: object) -> float:
    """A leeway that is neither negative nor so long that an expired token lives on.

    Raises:
        IdentityProviderConfigError: it is.
    """
    if not 0 <= leeway <= MAX_LEEWAY_SECONDS:
        raise IdentityProviderConfigError(
            f"PLM_IDENTITY_LEEWAY_SECONDS must be a number from 0 to {MAX_LEEWAY_SECONDS:g}; got {given!r:.40}"
        )
    return leeway


def _reason(error: Exception) -> RejectReason:
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return RejectReason.MALFORMED_TOKEN
