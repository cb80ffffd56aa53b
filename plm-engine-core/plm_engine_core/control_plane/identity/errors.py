"""What can be wrong with an identity; a class says what the caller can do, `code` and `reason` say it to machines.

IdentityValidationError             the request is answered 401
├── IdentityMissingError            send a bearer token
├── IdentityInvalidSignatureError   the token is not ours, or its secret was retired
├── IdentityExpiredError            get a new token
└── IdentityMalformedError          the token was made wrongly: change its issuer
IdentityProviderUnavailable         the request is answered 503: the issuer's keys cannot be had, try again
IdentityProviderConfigError         the process must not start: change its settings
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar
from uuid import UUID


class RejectReason(StrEnum):
    """Why an identity was refused."""

    MISSING = "missing"
    BAD_SIGNATURE = "bad_signature"
    EXPIRED = "expired"
    MALFORMED_TOKEN = "malformed_token"  # noqa: S105 - a reason, no secret
    MISSING_CLAIM = "missing_claim"
    UNSUPPORTED_ALGORITHM = "unsupported_algorithm"
    MAX_LIFETIME_EXCEEDED = "max_lifetime_exceeded"
    INVALID_ACTOR_KIND = "invalid_actor_kind"
    INVALID_CLAIM = "invalid_claim"
    NOT_YET_VALID = "not_yet_valid"  # `nbf` or `iat` lies in the future
    WRONG_ISSUER = "wrong_issuer"
    WRONG_AUDIENCE = "wrong_audience"  # RFC 7519, section 4.1.3: a token for somebody else must be refused
    UNKNOWN_TENANT = "unknown_tenant"
    UNKNOWN_KEY = "unknown_key"  # the issuer publishes no such key (any more)


class IdentityValidationError(Exception):
    """The caller's identity was not established.

    `tenant_id` is the token's tenant where its signature proved it, else None. Neither the text nor a field repeats
    any part of the token. `remedy` is what the caller does next.
    """

    code: ClassVar[str] = "IDENTITY_INVALID"
    remedy: ClassVar[str] = "get another token from your identity provider"

    def __init__(self, message: str, *, reason: RejectReason, tenant_id: UUID | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.tenant_id = tenant_id


class IdentityMissingError(IdentityValidationError):
    """No bearer token was sent."""

    code = "IDENTITY_MISSING"
    remedy = "send the header `Authorization: Bearer <token>`"

    def __init__(self, message: str = "the request has no bearer token") -> None:
        super().__init__(message, reason=RejectReason.MISSING)


class IdentityInvalidSignatureError(IdentityValidationError):
    """No secret of ours made the signature."""

    code = "IDENTITY_INVALID_SIGNATURE"

    def __init__(
        self,
        message: str = "the token's signature does not match",
        *,
        reason: RejectReason = RejectReason.BAD_SIGNATURE,
    ) -> None:
        super().__init__(message, reason=reason)


class IdentityExpiredError(IdentityValidationError):
    """The token was good and is over."""

    code = "IDENTITY_EXPIRED"

    remedy = "get a new one from your identity provider"

    def __init__(self, message: str = "the token has expired", *, tenant_id: UUID | None = None) -> None:
        super().__init__(message, reason=RejectReason.EXPIRED, tenant_id=tenant_id)


class IdentityMalformedError(IdentityValidationError):
    """The token's form, header or claims break a rule; `reason` says which."""

    code = "IDENTITY_MALFORMED"
    remedy = "get one that is right from your identity provider, and send only that"


class IdentityProviderUnavailable(Exception):
    """Whether the token is good cannot be said now: the issuer's keys could not be fetched, or are too old.

    `retry_after_seconds` is when asking again makes sense. The text names our settings, never the token.
    """

    code: ClassVar[str] = "IDENTITY_PROVIDER_UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class IdentityProviderConfigError(RuntimeError):
    """The identity provider's settings are missing, weak or not allowed here."""
