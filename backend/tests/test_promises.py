"""The pages of promises and of the security model name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "security_model.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/-]+/tests/[\w/]+\.py(?:::\w+)?)`", PAGE + SECURITY)))


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_holds_a_promise_exists(named):
    path, _, test = named.partition("::")
    assert re.search(rf"def {test}\(" if test else "def test_", (ROOT / path).read_text(encoding="utf-8"))


def test_every_promise_names_its_test_or_says_that_it_is_not_tested():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
    assert rows
    assert [row for row in rows if "/tests/" not in row and "not yet tested" not in row] == []
