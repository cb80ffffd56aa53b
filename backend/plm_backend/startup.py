"""What every command of the application does first: settings and secret, and one sentence when it cannot start."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from plm_engine_core.cli.exits import ExitCode, fail
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.identity import (
    Hs256JwtIdentityProvider,
    IdentityProviderConfigError,
    identity_mode,
    provider_from_environment,
)
from plm_shared.embedded_postgres import PostgresUnavailable
from pydantic import ValidationError

from plm_backend.errors import DatabaseLost, SetupError
from plm_backend.settings import Settings
from plm_backend.state import LocalState

SECRET = "PLM_IDENTITY_HS256_SECRET_ACTIVE"  # noqa: S105  # the name of a variable
OLDER_SECRET = "PLM_IDENTITY_HS256_SECRET"  # noqa: S105  # the name of a variable
_NOT_OURS = "name a folder of your own in PLM_STATE_DIR"
_FOLDER_REMEDIES = {
    errno.ENOSPC: "make room, then repeat",
    errno.EDQUOT: "make room, then repeat",
    errno.EACCES: _NOT_OURS,
    errno.EEXIST: _NOT_OURS,
    errno.ENAMETOOLONG: _NOT_OURS,
    errno.ENOTDIR: _NOT_OURS,
    errno.EPERM: _NOT_OURS,
    errno.EROFS: _NOT_OURS,
}


@contextmanager
def setup_errors() -> Iterator[None]:
    """One sentence on standard error for whatever the operator has to change, and a documented exit code."""
    try:
        yield
    except (SetupError, IdentityProviderConfigError, PostgresUnavailable, ControlPlaneError) as error:
        fail(ExitCode.NOT_CONFIGURED, str(error))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0])
        variable = name if name.isupper() else f"PLM_{name.upper()}"
        fail(ExitCode.NOT_CONFIGURED, f"{variable}: {first['msg']}")
    except DatabaseLost as error:
        fail(ExitCode.FAILED, str(error))
    except OSError as error:
        if error.errno not in _FOLDER_REMEDIES:
            raise
        place = error.filename or "a folder of this installation"
        fail(ExitCode.NOT_CONFIGURED, f"{place}: {error.strerror}; {_FOLDER_REMEDIES[error.errno]}")
    except KeyboardInterrupt:
        fail(ExitCode.INTERRUPTED, "interrupted; what was finished is kept, so just start it again")


def load_settings() -> Settings:
    """The settings of this process, and proof that it will know who is calling.

    In development, tokens are signed with a secret this installation made itself, unless one or an issuer is given.

    Raises:
        IdentityProviderConfigError: no identity provider is configured, or not a good one; there is no way around.
    """
    settings = Settings()
    shared = identity_mode() == Hs256JwtIdentityProvider.name
    if shared and settings.development and not (os.environ.get(SECRET) or os.environ.get(OLDER_SECRET)):
        os.environ[SECRET] = LocalState(settings.state_dir).secret("identity_hs256")
    provider_from_environment()
    return settings
