"""Bearer tokens at the terminal: where they are read from, and whom they name here."""

from __future__ import annotations

import asyncio
import sys

from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.cli.output import show_refusal
from plm_engine_core.control_plane.identity import (
    IdentityContext,
    IdentityProvider,
    IdentityProviderConfigError,
    IdentityProviderUnavailable,
    IdentityValidationError,
    provider_from_environment,
)

_MOST_READ = 65_536


def configured_provider() -> IdentityProvider:
    """The identity provider of this environment; ends the command where there is none."""
    try:
        return provider_from_environment()
    except IdentityProviderConfigError as error:
        fail(ExitCode.NOT_CONFIGURED, str(error))


def read_token() -> str:
    """The token on standard input; never an argument, which every process could read."""
    if sys.stdin is None:  # it was closed
        return ""
    if sys.stdin.isatty():
        print("paste the token, then press Enter and Ctrl-D", file=sys.stderr)
    return bare(sys.stdin.read(_MOST_READ))


def bare(text: str) -> str:
    """A token without what often stands around it."""
    return text.strip().removeprefix("Bearer ").strip()


def identified(provider: IdentityProvider, token: str, *, as_json: bool = False) -> IdentityContext:
    """Who the token says it is; ends the command where the platform would not let it in."""
    try:
        return asyncio.run(provider.identify(token))
    except IdentityValidationError as error:
        show_refusal(error.code, error.reason, str(error), as_json=as_json)
        fail(ExitCode.FAILED, f"{error.code} ({error.reason}): {error}; {error.remedy}")
    except IdentityProviderUnavailable as error:
        show_refusal(error.code, error.code, str(error), as_json=as_json)
        fail(ExitCode.FAILED, f"{error.code}: {error}; check that this machine reaches the issuer")
