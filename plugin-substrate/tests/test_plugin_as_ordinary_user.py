"""As root, the plugins that attack, the hostile ones and the orphans run once more as another user.

As root, what the kernel forbids every process is tried; as somebody else, what it forbids a process of the same user.
It needs an interpreter that this user can run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from other_users import NOBODY, interpreter_for_everybody

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers tested here are Linux's")


@pytest.mark.skipif(os.geteuid() != 0, reason="this run is an ordinary user's already")
@pytest.mark.timeout(660)
def test_all_this_holds_as_an_ordinary_user() -> None:
    python = interpreter_for_everybody()
    with tempfile.TemporaryDirectory(prefix="plugin-attacks-") as folder:
        os.chown(folder, NOBODY, NOBODY)
        paths = [entry for entry in sys.path if not entry.startswith(f"{sys.base_prefix}/")]
        environment = {
            "PATH": os.defpath,
            "HOME": folder,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        files = [str(HERE / f"test_plugin_{name}.py") for name in ("attacks", "bubblewrap", "hostile", "orphans")]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/t", *files]
        done = subprocess.run(
            command, cwd=HERE.parent, env=environment, user=NOBODY, group=NOBODY, extra_groups=[],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if "bubblewrap make" not in done.stdout:  # else an ordinary user may make no mount namespace here
        assert "238 passed, 15 skipped" in done.stdout, "everything but what only root can do"
