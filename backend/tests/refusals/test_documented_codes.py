"""The page knows every code and reason that the platform can answer with, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from plm_backend import problems
from plm_engine_core.control_plane.identity import errors as identity
from plm_engine_core.control_plane.vocabulary import Reason

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
OF_THE_DOORS = {
    "AUDIT_UNAVAILABLE",
    "INVALID_CORE_CALLER",
    "CORE_CALLER_MISMATCH",
    identity.IdentityProviderUnavailable.code,
}


def _codes() -> set[str]:
    kinds = identity.IdentityValidationError.__subclasses__()
    return {*problems._TITLES, *(kind.code for kind in kinds), *OF_THE_DOORS}


def test_every_code_has_its_meaning_on_the_page() -> None:
    table = PAGE.partition("| code | meaning |")[2].partition("## Refusals")[0]
    assert set(re.findall(r"`([A-Z]{3,}_\w+|[a-z]+/\w+)`", table)) == _codes()


def test_every_reason_stands_on_the_page() -> None:
    assert {reason for reason in Reason if f"`{reason.value}`" not in PAGE} == set()
