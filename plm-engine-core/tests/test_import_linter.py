"""The import contracts hold, and each of the two named ones would notice a violation.

The negative tests exist only with RUN_LINTER_NEGATIVE=1. They work on a copy of the package, so that a test that is
killed leaves nothing in the sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SANDBOX = Path("plm_engine_core/control_plane/_lint_fixtures")
CONTRACTS = {
    "control_plane-must-not-depend-on-agent_runtime": "plm_engine_core.agent_runtime",
    "plm_engine_core-must-not-depend-on-workbench": "plm_accelerators",
}


def lint(folder: Path) -> tuple[int, str]:
    """Run lint-imports on the package in this folder, whichever is installed."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_every_contract_is_kept() -> None:
    status, report = lint(PROJECT)
    assert status == 0, report
    for contract in CONTRACTS:
        assert f"{contract} KEPT" in report


if os.environ.get("RUN_LINTER_NEGATIVE") == "1":

    @pytest.fixture
    def copy(tmp_path: Path) -> Path:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / "plm_engine_core", tmp_path / "plm_engine_core", ignore=ignored)
        shutil.copy(PROJECT / ".importlinter", tmp_path)
        return tmp_path

    @pytest.mark.parametrize(("contract", "forbidden"), CONTRACTS.items(), ids=CONTRACTS)
    @pytest.mark.parametrize("guarded", [False, True], ids=["imported", "type_checking"])
    def test_negative_fixture_trips_the_named_contract_at_its_line(
        copy: Path, contract: str, forbidden: str, guarded: bool
    ) -> None:
        assert (copy / SANDBOX / "violation_demo.py").exists()
        violation = copy / SANDBOX / "_temp_violation.py"
        opening = "if TYPE_CHECKING:\n    " if guarded else "\n"
        violation.write_text(f"from typing import TYPE_CHECKING\n{opening}import {forbidden}\n", encoding="utf-8")
        status, report = lint(copy)
        assert status == 1, report
        assert f"{contract} BROKEN" in report
        where = f"{SANDBOX}/_temp_violation".replace("/", ".")
        assert f"{where} -> {forbidden} (l.3)" in " ".join(report.split())
        others = [name for name in CONTRACTS if name != contract]
        assert all(f"{name} KEPT" in report for name in others)
        violation.unlink()
        status, report = lint(copy)
        assert status == 0, report
