"""What every command of the application does first: settings and secret, and one sentence when it cannot start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.identity import IdentityProviderConfigError
from plm_shared.embedded_postgres import PostgresUnavailable
from pydantic import ValidationError

from plm_backend.errors import SetupError
from plm_backend.settings import Settings
from plm_backend.state import LocalState

SECRET = "PLM_IDENTITY_HS256_SECRET_ACTIVE"  # noqa: S105  # the name of a variable


@contextmanager
def setup_errors() -> Iterator[None]:
    """One sentence on standard error and exit code 3 for whatever the operator has to change."""
    try:
        yield
    except (SetupError, IdentityProviderConfigError, PostgresUnavailable, ControlPlaneError) as error:
        fail(ExitCode.NOT_CONFIGURED, str(error))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])
        variable = name if name.isupper() else f"PLM_{name.upper()}"
        fail(ExitCode.NOT_CONFIGURED, f"{variable}: {first['msg']}")


def load_settings() -> Settings:
    """The settings of this process.

    In development, tokens are signed with a secret this installation made itself, unless one is given.
    """
    settings = Settings()
    if settings.development and not os.environ.get(SECRET):
        os.environ[SECRET] = LocalState(settings.state_dir).secret("identity_hs256")
    return settings
