"""The operator's page about policies: its examples run, and it names every key there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args
from uuid import UUID

import pytest
from plm_engine_core.cli import build_app
from plm_engine_core.control_plane.admission.evaluators import BUILT_IN
from plm_engine_core.control_plane.limits import Limit, SubjectZone
from plm_engine_core.control_plane.policy import (
    ApprovalDemand,
    ApprovalRule,
    Effect,
    Escalation,
    EvaluatorSpec,
    InputRule,
    PolicySnapshot,
    Rule,
    StandingApproval,
)
from plm_engine_core.control_plane.policy.conditions import Comparison, Condition
from plm_engine_core.control_plane.policy.fields import ROOTS
from plm_engine_core.control_plane.policy.models import ModelRule, UserModels
from plm_engine_core.control_plane.policy.run_risk import RiskPattern, RunRisk
from plm_engine_core.control_plane.policy.snapshot import BudgetDefaults, RateLimit
from plm_engine_core.control_plane.registry import load_capabilities
from plm_engine_core.control_plane.vocabulary import ActionTier, Stage
from typer.testing import CliRunner

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")


@pytest.fixture
def examples(tmp_path):
    """The files of the page; each block begins with its name."""
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.+?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder, command, *arguments):
    files = [str(folder / argument) if argument.endswith(".yaml") else argument for argument in arguments]
    environment = {"PLM_CAPABILITIES": str(folder / "capabilities.yaml")}
    return CliRunner().invoke(build_app(), ["policy", command, *files], env=environment)


def test_the_cases_of_the_page_are_decided_as_it_says(examples):
    result = run(examples, "test", "policy.yaml", "cases.yaml")
    assert (result.exit_code, result.stdout) == (0, "14 of 14 cases as expected\n")


def test_lint_has_no_error_to_name_in_the_policy_of_the_page(examples):
    result = run(examples, "lint", "policy.yaml", "--json")
    assert result.exit_code == 0, result.stdout
    assert [each["check"] for each in json.loads(result.stdout)["remarks"]] == []


def test_the_page_says_for_which_tenants_a_capability_is(examples):
    registry = load_capabilities(examples / "for-some-tenants.yaml")
    first, second = (UUID(f"018f0000-0000-7000-8000-00000000000{number}") for number in (1, 2))
    access = {each.id: (each.access_of(first), each.access_of(second)) for each in registry}
    assert access == {
        "mail.read": ("denied_tenant", "not_denied_tenant"),
        "mail.summarise": ("not_allowed_tenant", "allowed_tenant"),
    }


def test_the_page_says_which_capabilities_lock_their_resource(examples):
    registry = load_capabilities(examples / "that-lock.yaml")
    locks = {each.id: each.lock for each in registry}
    assert locks == {"mail.read": None, "mail.move": "tenant", "mail.label": "tenant", "mail.draft": "run"}


CONDITIONS = get_args(get_args(Condition)[0])
MODELS = [PolicySnapshot, Rule, RunRisk, RiskPattern, EvaluatorSpec, RateLimit, ApprovalRule, BudgetDefaults]
MODELS += [ApprovalDemand, Escalation, InputRule, StandingApproval, Limit, SubjectZone, ModelRule, UserModels]


@pytest.mark.parametrize("model", [*MODELS, *CONDITIONS, *(kind.config_schema for kind in BUILT_IN)])
def test_the_page_names_every_key(model):
    keys = {info.alias or name for name, info in model.model_fields.items()} - {"type"}
    assert {key for key in keys if not re.search(f"`{key}[`:]", PAGE)} == set()


def test_the_page_names_every_word_a_policy_may_use():
    words = {
        *(condition.model_fields["type"].default for condition in CONDITIONS),
        *get_args(Comparison),
        *(effect.value for effect in Effect),
        *(kind.kind for kind in BUILT_IN),
        *(tier.value for tier in ActionTier),
        *ROOTS,
    }
    assert {word for word in words if f"`{word}`" not in PAGE} == set()
    assert {stage for stage in Stage if f"**{stage.value}**" not in PAGE} == set()
