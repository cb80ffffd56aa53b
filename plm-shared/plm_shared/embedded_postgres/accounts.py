"""Whom the server runs as, and running commands as that account."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plm_shared.embedded_postgres.errors import ServerAccountMissing

ACCOUNT_SETTING = "PLM_PG_ACCOUNT"
_CANDIDATES = ("postgres", "nobody")
_PATIENCE = 120


@dataclass(frozen=True, kw_only=True)
class Account:
    """An existing login; ``switched`` when it is not the one we run as."""

    name: str
    uid: int
    gid: int
    switched: bool

    def run(
        self, argv: Sequence[str | Path], *, cwd: Path = Path("/"), keep_open: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as this account, in a clean environment, by default away from our working folder.

        It hears no Ctrl-C of our terminal: we do, and end it. What is in ``keep_open`` stays open in it.

        Raises:
            PermissionError: the account cannot reach the program.
        """
        return subprocess.run(
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
            cwd=cwd,
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            umask=0o077,
            pass_fds=keep_open,
            start_new_session=True,
            user=self.uid if self.switched else None,
            group=self.gid if self.switched else None,
            extra_groups=[] if self.switched else None,
        )

    def can_enter(self, folder: Path) -> bool:
        """Ask the kernel, as this account, whether the folder can be searched."""
        return self.run(["test", "-x", folder]).returncode == 0

    def own(self, path: Path) -> None:
        """Give a path that we have just made to this account."""
        if self.switched:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


def server_account() -> Account:
    """Who runs the server: ourselves, or when we are root an existing unprivileged account.

    Raises:
        ServerAccountMissing: our uid has no name, or root finds no other account.
    """
    if os.geteuid() != 0:
        return _ourselves()
    setting = os.environ.get(ACCOUNT_SETTING)
    for name in (setting,) if setting else _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name=name, uid=entry.pw_uid, gid=entry.pw_gid, switched=True)
    raise ServerAccountMissing(
        f"PostgreSQL does not run as root, and {setting or ' or '.join(_CANDIDATES)} is no unprivileged account here; "
        f"name an existing one in {ACCOUNT_SETTING}"
    )


def _ourselves() -> Account:
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise ServerAccountMissing(
            f"PostgreSQL does not run under uid {uid}, which has no name in the password database; "
            "run as a named user, or set PG_DSN to a server that runs elsewhere"
        ) from None
    return Account(name=name, uid=uid, gid=os.getegid(), switched=False)
