"""The benchmarks are run by hand: here only that each says how, without running."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PARTS = {"awake.py", "figures.py", "governance_events.py", "server_log.py"}  # what the others import
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py") if path.name not in PARTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_asked_for_help_says_what_it_measures_and_runs_nothing(script: str) -> None:
    words = [sys.executable, str(BENCH / script), "--help"]
    said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert said.returncode == 0, said.stderr
    assert "--json" in said.stdout
    assert said.stdout.count("\n\n") >= 2, "its purpose stands between usage and options"
