"""What one installation keeps beside its database: secrets it made itself, in files only it can read."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


class LocalState:
    """A folder of ours, closed to others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def secret(self, name: str) -> str:
        """A secret of 64 hexadecimal digits, made once; two processes that ask at once get the same."""
        folder = self.folder / "secrets"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / name
        if not path.exists():
            draft = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(secrets.token_hex(32))
                with suppress(FileExistsError):  # another process was first; its secret counts
                    path.hardlink_to(draft)
            finally:
                draft.unlink()
        return path.read_text(encoding="ascii")
