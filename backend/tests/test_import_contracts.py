"""The floors between the packages: imports only go down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BACKEND = Path(__file__).parents[1]


def test_every_contract_between_the_packages_is_kept() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=BACKEND, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
