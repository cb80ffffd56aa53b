"""Files of the operator that cannot be right: the server does not start, and one sentence says which and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

TABLE = "Starts"
Refusal = tuple[dict[str, str], tuple[str, ...]]
PLAN = """agent: {name}
version: "1"
inputs: {{}}
steps:
  - {{id: act, capability: {capability}, arguments: {{value: {{ref: {reference}}}}}}}
  - {{id: next, capability: probe.echo, arguments: {{}}}}
"""


@dataclass(frozen=True)
class Cases:
    """Each answers settings, and words that the sentence must hold."""

    _folder: Path
    _environment: dict[str, str]
    _altered_policy: Callable[..., str]

    def _plan(self, text: str, *says: str) -> Refusal:
        agents = self._folder / "agents"
        shutil.copytree(self._environment["PLM_AGENTS"], agents)
        (agents / "zz-odd.yaml").write_text(text, encoding="utf-8")
        return {"PLM_AGENTS": str(agents)}, ("zz-odd.yaml", *says)

    def _odd(
        self, *, name: str = "odd", capability: str = "probe.echo", reference: str = "inputs", says: str
    ) -> Refusal:
        return self._plan(PLAN.format(name=name, capability=capability, reference=reference), says)

    def plan_that_names_an_unknown_capability(self) -> Refusal:
        plan = "agent: odd\nversion: '1'\nsteps: [{id: act, capability: probe.unheard}]\n"
        return self._plan(plan, "capability probe.unheard is not registered")

    def plan_that_uses_the_result_of_a_step_that_does_not_exist(self) -> Refusal:
        return self._odd(reference="steps.nowhere.output", says="step 'act' refers to 'steps.nowhere.output'")

    def plan_that_uses_the_result_of_a_later_step(self) -> Refusal:
        return self._odd(reference="steps.next.output", says="step 'act' refers to 'steps.next.output'")

    def plan_that_is_not_yaml(self) -> Refusal:
        return self._plan("agent: [odd", "is not YAML")

    def plan_with_an_unknown_member(self) -> Refusal:
        return self._plan(
            "agent: odd\nversion: '1'\nsurprise: 1\nsteps: [{id: a, capability: probe.echo}]\n", "surprise"
        )

    def two_plans_of_one_name(self) -> Refusal:
        plan = "agent: echo\nversion: '1'\nsteps: [{id: act, capability: probe.echo}]\n"
        return self._plan(plan, "agent echo stands in two files")

    def policy_that_steers_without_guidance(self) -> Refusal:
        return {"PLM_POLICY": self._altered_policy(guidance={})}, ("policy.yaml", "guidance", "probe.steered")

    def policy_that_names_an_unknown_capability(self) -> Refusal:
        policy = self._altered_policy(risk_by_capability={"probe.gone": "low"})
        return {"PLM_POLICY": policy}, ("policy.yaml", "risk_by_capability.probe.gone", "is not registered")

    def policy_with_an_evaluator_that_is_not_installed(self) -> Refusal:
        policy = self._altered_policy(evaluators=[{"name": "odd", "kind": "oracle"}])
        return {"PLM_POLICY": policy}, ("evaluators.odd", "no evaluator of kind oracle is installed")

    def capability_registered_as_idempotent_against_its_plugin(self) -> Refusal:
        document = yaml.safe_load(Path(self._environment["PLM_CAPABILITIES"]).read_text(encoding="utf-8"))
        for each in document["capabilities"]:
            each["idempotent"] = True
        path = self._folder / "capabilities.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return {"PLM_CAPABILITIES": str(path)}, ("capability fragile.append", "plugin fragile", "correct one of them")


@pytest.fixture
def cases(tmp_path: Path, platform: Any, altered_policy: Any) -> Cases:
    return Cases(tmp_path, platform.environment, altered_policy)


def test_what_cannot_be_right_does_not_start(row: Any, cases: Cases, platform: Any, cli: Any) -> None:
    settings, says = getattr(cases, row.method)()
    done = cli("serve", "--port", "0", environment={**platform.environment, **settings})
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    for words in says:
        assert words in sentence
    assert "; " in sentence, "it says what to do"


def test_every_row_has_its_scenario(unasked: set[str]) -> None:
    assert unasked == set()
