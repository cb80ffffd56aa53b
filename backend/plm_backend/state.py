"""What one installation keeps beside its database: secrets it made itself, in files only it can read."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from plm_engine_core.control_plane.events.signing import new_private_pem

from plm_backend.settings import Settings


class LocalState:
    """A folder of ours, closed to others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def secret(self, name: str) -> str:
        """A secret of 64 hexadecimal digits, made once; two processes that ask at once get the same."""
        return self.secret_file(name, lambda: secrets.token_hex(32)).read_text(encoding="ascii")

    def secret_file(self, name: str, make: Callable[[], str]) -> Path:
        """A file with what `make` made once; two processes that ask at once get the same."""
        folder = self.folder / "secrets"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / name
        if not path.exists():
            draft = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(make())
                with suppress(FileExistsError):  # another process was first; its secret counts
                    path.hardlink_to(draft)
            finally:
                draft.unlink()
        return path


def events_key(settings: Settings) -> Path | None:
    """The file of the key that signs checkpoints: the operator's, or in development one of this installation's own."""
    if settings.events_key is None and settings.development:
        return LocalState(settings.state_dir).secret_file("events_key", new_private_pem)
    return settings.events_key
