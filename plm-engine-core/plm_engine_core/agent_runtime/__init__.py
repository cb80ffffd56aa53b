"""The agent runtime: asks agents, obeys the control plane, and has granted calls carried out."""

from plm_engine_core.agent_runtime.agent import Agent, AskInput, Finish, History, Propose
from plm_engine_core.agent_runtime.driver import AgentFactory, Driver
from plm_engine_core.agent_runtime.executor import Call, Executor, Progress
from plm_engine_core.agent_runtime.plan import Plan, PlanAgent, load_plan
from plm_engine_core.agent_runtime.selector import Selector

__all__ = [
    "Agent",
    "AgentFactory",
    "AskInput",
    "Call",
    "Driver",
    "Executor",
    "Finish",
    "History",
    "Plan",
    "PlanAgent",
    "Progress",
    "Propose",
    "Selector",
    "load_plan",
]
