"""Tokens of an OpenID Connect issuer: the provider for production."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self
from uuid import UUID, uuid5

from plm_shared.canonical_json import encodable

from plm_engine_core.control_plane.identity.claims import read_claims, verified_tenant
from plm_engine_core.control_plane.identity.context import ActorKind, IdentityContext
from plm_engine_core.control_plane.identity.errors import (
    IdentityInvalidSignatureError,
    IdentityMalformedError,
    IdentityProviderConfigError,
    RejectReason,
)
from plm_engine_core.control_plane.identity.issuer_keys import (
    KIND_OF_ALGORITHM,
    IssuerKeys,
    SigningKey,
    checked_address,
    checked_algorithms,
)
from plm_engine_core.control_plane.identity.tokens import (
    check_standing,
    checked_leeway,
    leeway_of,
    read_header,
    signed_payload,
)

DEFAULT_ALGORITHMS: Final = ("RS256", "ES256")
DEFAULT_LEEWAY_SECONDS: Final = 30.0

_TYPES: Final = ("JWT", "AT+JWT")  # RFC 9068, section 2.1
_SUBJECTS: Final = UUID("5d0b4c0e-4c1e-5d7c-9b41-5a0f3f6f7a11")


@dataclass(frozen=True, kw_only=True)
class ClaimNames:
    """Where the issuer puts what we need; `scopes` may be a list, or a text with blanks between (RFC 8693)."""

    tenant_id: str = "tenant_id"
    actor_kind: str = "actor_kind"
    scopes: str = "scope"


class OidcIdentityProvider:
    """Access tokens of one OpenID Connect issuer for one audience, signed with keys that it publishes.

    A `sub` that is no UUID becomes one, the same for the same issuer and subject. `actor_kind` must be ``human`` or
    ``agent``: nobody outside is the platform itself. The clocks may be `leeway_seconds` apart.

    Raises:
        IdentityProviderConfigError: a setting is missing or not allowed.
    """

    name = "oidc"

    def __init__(
        self,
        *,
        issuer: str,
        audience: str,
        keys: IssuerKeys,
        algorithms: Collection[str] = DEFAULT_ALGORITHMS,
        claims: ClaimNames | None = None,
        leeway_seconds: float = DEFAULT_LEEWAY_SECONDS,
    ) -> None:
        if not audience:
            raise IdentityProviderConfigError(
                "PLM_OIDC_AUDIENCE is not set; without it tokens made for another application would be accepted"
            )
        self._issuer, self._audience, self._keys = issuer, audience, keys
        self._algorithms = checked_algorithms(algorithms)
        self._names = claims or ClaimNames()
        self._leeway = checked_leeway(leeway_seconds, given=leeway_seconds)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The provider that the environment describes; an empty variable counts as unset.

        ``PLM_OIDC_ISSUER``, ``PLM_OIDC_AUDIENCE``, and if wanted ``PLM_OIDC_ALGORITHMS`` (RS256,ES256),
        ``PLM_OIDC_JWKS_URI`` (from discovery), ``PLM_OIDC_TENANT_CLAIM``, ``PLM_OIDC_ACTOR_KIND_CLAIM``,
        ``PLM_OIDC_SCOPES_CLAIM`` and ``PLM_IDENTITY_LEEWAY_SECONDS`` (30). Nothing is fetched yet.

        Raises:
            IdentityProviderConfigError: a setting is missing or not allowed.
        """
        development = (environ.get("ENVIRONMENT") or "development").strip().casefold() == "development"
        issuer, uri = environ.get("PLM_OIDC_ISSUER"), environ.get("PLM_OIDC_JWKS_URI") or None
        if not issuer:
            raise IdentityProviderConfigError("PLM_OIDC_ISSUER is not set; set it to the issuer's https address")
        checked_address(issuer, variable="PLM_OIDC_ISSUER", development=development)
        if uri is not None:
            checked_address(uri, variable="PLM_OIDC_JWKS_URI", development=development)
        names = (environ.get("PLM_OIDC_ALGORITHMS") or ",".join(DEFAULT_ALGORITHMS)).split(",")
        return cls(
            issuer=issuer,
            audience=environ.get("PLM_OIDC_AUDIENCE") or "",
            keys=IssuerKeys(issuer, jwks_uri=uri),
            algorithms=[name.strip() for name in names if name.strip()],
            claims=ClaimNames(
                tenant_id=environ.get("PLM_OIDC_TENANT_CLAIM") or ClaimNames.tenant_id,
                actor_kind=environ.get("PLM_OIDC_ACTOR_KIND_CLAIM") or ClaimNames.actor_kind,
                scopes=environ.get("PLM_OIDC_SCOPES_CLAIM") or ClaimNames.scopes,
            ),
            leeway_seconds=leeway_of(environ, default=DEFAULT_LEEWAY_SECONDS),
        )

    async def identify(self, token: str) -> IdentityContext:
        """See `IdentityProvider.identify`; old keys and an unknown key id make it fetch, once in a while."""
        key_id, _ = self._header(token)
        if not self._keys.knows(key_id) or self._keys.overdue:
            await self._keys.refresh()
        elif self._keys.due:
            self._keys.refresh_soon()
        return self.validate(token)

    def validate(self, token: str) -> IdentityContext:
        """See `IdentityProvider.validate`."""
        key_id, algorithm = self._header(token)
        key = self._key(key_id, algorithm)
        payload = signed_payload(token, key.key, algorithm)
        if payload is None:
            raise IdentityInvalidSignatureError
        claims = read_claims(self._renamed(payload))
        if claims.actor_kind is ActorKind.SYSTEM:
            raise IdentityMalformedError(
                "no token makes its bearer the platform itself",
                reason=RejectReason.INVALID_ACTOR_KIND,
                tenant_id=claims.tenant_id,
            )
        check_standing(
            token,
            key.key,
            algorithm,
            issuer=self._issuer,
            audience=self._audience,
            leeway_seconds=self._leeway,
            tenant_id=claims.tenant_id,
        )
        return claims.identity()

    def _header(self, token: str) -> tuple[str, str]:
        header = read_header(token, algorithms=self._algorithms, types=_TYPES)
        key_id = header.get("kid")
        if not isinstance(key_id, str):
            raise IdentityMalformedError("the token names no key", reason=RejectReason.MALFORMED_TOKEN)
        return key_id, str(header["alg"])

    def _key(self, key_id: str, algorithm: str) -> SigningKey:
        key = self._keys.at(key_id)
        if key is None:
            if not self._keys.reachable:
                raise self._keys.unavailable()
            raise IdentityInvalidSignatureError(
                "the issuer publishes no key of the token's id", reason=RejectReason.UNKNOWN_KEY
            )
        if key.kind != KIND_OF_ALGORITHM[algorithm] or key.algorithm not in {None, algorithm}:
            raise IdentityMalformedError(
                "the token's algorithm is not that of its key", reason=RejectReason.UNSUPPORTED_ALGORITHM
            )
        return key

    def _renamed(self, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """The claims under the names that `read_claims` knows; a claim of ours under its own name never counts."""
        ours = {"tenant_id", "actor_kind", "scopes"}
        kept = {name: value for name, value in payload.items() if name not in ours}
        scopes = payload.get(self._names.scopes)
        return {
            **kept,
            "sub": self._subject(payload.get("sub")),
            "tenant_id": payload.get(self._names.tenant_id),
            "actor_kind": payload.get(self._names.actor_kind),
            "scopes": scopes.split() if isinstance(scopes, str) else scopes,
        }

    def _subject(self, subject: Any) -> Any:
        """A UUID for whatever an issuer calls its users; another issuer's user of the same name is somebody else."""
        if not isinstance(subject, str) or not subject or not encodable(subject):
            return subject  # which is refused
        same = verified_tenant({"tenant_id": subject})
        if same is not None and str(same) == subject:  # in capitals it is another subject
            return subject
        return str(uuid5(_SUBJECTS, f"{self._issuer} {subject}"))
