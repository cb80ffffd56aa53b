"""What tests need to run something as another user than root."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import plugin_substrate
import pytest

NOBODY = 65534


def interpreter_for_everybody() -> str:
    """Return an interpreter of this version that another user can run; skip the test where there is none.

    Nor is there a way where this checkout lies in a folder that only its owner can enter, as root's home is.
    """
    asked = "import os, sys; print(sys.version_info[:2], all(os.access(path, os.R_OK) for path in sys.argv[1:]))"
    for candidate in (f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}", "/usr/bin/python3"):
        if Path(candidate).exists():
            command = [candidate, "-c", asked, __file__, plugin_substrate.__file__, pytest.__file__]
            done = subprocess.run(command, capture_output=True, text=True, check=False, user=NOBODY)
            if done.stdout.startswith(str(sys.version_info[:2])):
                if not done.stdout.strip().endswith("True"):
                    pytest.skip("another user cannot enter the folder of this checkout, or of what is installed for it")
                return candidate
    pytest.skip(f"no Python {platform.python_version()} here that another user can run")
