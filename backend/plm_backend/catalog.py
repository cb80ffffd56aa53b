"""The agents this installation offers: the plans in one folder, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from plm_engine_core.agent_runtime import Agent, Plan, PlanAgent, load_plan
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.runs import Run


class AgentCatalog:
    """Plans by name. A run keeps the plan it was created with, so editing a file changes no run."""

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self._plans = dict(plans)

    def get(self, name: str) -> Plan:
        """The plan of an agent.

        Raises:
            InvalidRequest: there is none of that name.
        """
        plan = self._plans.get(name)
        if plan is None:
            known = ", ".join(sorted(self._plans)) or "none"
            raise InvalidRequest(f"there is no agent {name!r}; this installation has: {known}", field="agent")
        return plan

    def replace(self, other: AgentCatalog) -> None:
        """Offer the plans of another catalog instead, from the next run on."""
        self._plans = other._plans

    @staticmethod
    def agent_of(run: Run) -> Agent:
        """The agent of a run, from what the run recorded."""
        return PlanAgent(Plan.model_validate(run.agent["plan"]))


def load_catalog(folder: Path, registry: CapabilityRegistry) -> AgentCatalog:
    """Read every `*.yaml` plan of a folder, and check that each names only registered capabilities.

    Raises:
        InvalidRequest: naming the file or the folder, and what is wrong with it.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder; name the one with the plans in PLM_AGENTS", field="agents")
    plans: dict[str, Plan] = {}
    for path in sorted(folder.glob("*.yaml")):
        plan = load_plan(path)
        if plan.agent in plans:
            raise InvalidRequest(f"{path}: agent {plan.agent} stands in two files; rename one of them", field="agent")
        called = {step.capability for step in plan.steps if step.ask is None}
        unknown = sorted(each for each in called if registry.get(each) is None)
        if unknown:
            raise InvalidRequest(
                f"{path}: capability {unknown[0]} is not registered; register it, or correct the plan",
                field="capability",
            )
        plans[plan.agent] = plan
    return AgentCatalog(plans)
