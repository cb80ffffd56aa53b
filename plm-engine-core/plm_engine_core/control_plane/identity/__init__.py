"""Who is calling: tokens, the door that checks them, the platform's own identity, and the audit log."""

from __future__ import annotations

from plm_engine_core.control_plane.identity.audit import (
    AuditError,
    AuditEvent,
    AuditRecord,
    AuditSink,
    AuditTenantUnknown,
    AuditUnavailable,
    InMemoryAuditSink,
    PostgresAuditSink,
    audit_required,
)
from plm_engine_core.control_plane.identity.choice import identity_mode, provider_from_environment
from plm_engine_core.control_plane.identity.context import (
    ActorKind,
    IdentityContext,
    get_current_identity,
    identity_bound,
    make_test_identity,
    require_identity,
)
from plm_engine_core.control_plane.identity.errors import (
    IdentityExpiredError,
    IdentityInvalidSignatureError,
    IdentityMalformedError,
    IdentityMissingError,
    IdentityProviderConfigError,
    IdentityProviderUnavailable,
    IdentityValidationError,
    RejectReason,
)
from plm_engine_core.control_plane.identity.issuer_keys import IssuerKeys
from plm_engine_core.control_plane.identity.metrics import IdentityMetrics
from plm_engine_core.control_plane.identity.middleware import IdentityMiddleware
from plm_engine_core.control_plane.identity.oidc import ClaimNames, OidcIdentityProvider
from plm_engine_core.control_plane.identity.provider import Hs256JwtIdentityProvider, IdentityProvider
from plm_engine_core.control_plane.identity.system import SystemIdentities, with_system_identity

__all__ = [
    "ActorKind",
    "AuditError",
    "AuditEvent",
    "AuditRecord",
    "AuditSink",
    "AuditTenantUnknown",
    "AuditUnavailable",
    "ClaimNames",
    "Hs256JwtIdentityProvider",
    "IdentityContext",
    "IdentityExpiredError",
    "IdentityInvalidSignatureError",
    "IdentityMalformedError",
    "IdentityMetrics",
    "IdentityMiddleware",
    "IdentityMissingError",
    "IdentityProvider",
    "IdentityProviderConfigError",
    "IdentityProviderUnavailable",
    "IdentityValidationError",
    "InMemoryAuditSink",
    "IssuerKeys",
    "OidcIdentityProvider",
    "PostgresAuditSink",
    "RejectReason",
    "SystemIdentities",
    "audit_required",
    "get_current_identity",
    "identity_bound",
    "identity_mode",
    "make_test_identity",
    "provider_from_environment",
    "require_identity",
    "with_system_identity",
]
