"""Which identity provider the environment asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping

from plm_engine_core.control_plane.identity.errors import IdentityProviderConfigError
from plm_engine_core.control_plane.identity.oidc import OidcIdentityProvider
from plm_engine_core.control_plane.identity.provider import Hs256JwtIdentityProvider, IdentityProvider


def identity_mode(environ: Mapping[str, str] = os.environ) -> str:
    """``IDENTITY_PROVIDER_MODE``; when unset, ``oidc`` where an issuer is named, else ``hs256``."""
    asked = environ.get("IDENTITY_PROVIDER_MODE", "").strip().casefold()
    return asked or (OidcIdentityProvider.name if environ.get("PLM_OIDC_ISSUER") else Hs256JwtIdentityProvider.name)


def provider_from_environment(environ: Mapping[str, str] = os.environ) -> IdentityProvider:
    """The one provider that this process trusts.

    Raises:
        IdentityProviderConfigError: the mode is unknown, two providers are configured at once, or a setting is missing
            or refused. There is no mode without identity.
    """
    mode = identity_mode(environ)
    if mode == OidcIdentityProvider.name:
        return OidcIdentityProvider.from_environment(environ)
    if environ.get("PLM_OIDC_ISSUER"):
        raise IdentityProviderConfigError(
            f"PLM_OIDC_ISSUER is set and IDENTITY_PROVIDER_MODE is {mode!r}; unset one of them"
        )
    return Hs256JwtIdentityProvider.from_environment(environ)
