"""For whom a run works: what budgets, rates and halts may be about, beside the run and its tenant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID


@dataclass(frozen=True, kw_only=True, slots=True)
class Subjects:
    """The agent, run group, user and team of a run; set when it is created and never changed.

    None where a run has none: then no budget and no halt of that scope is about it.
    """

    agent_id: str | None = None
    run_group_id: UUID | None = None
    user_id: UUID | None = None
    team: str | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Subjects:
        """Back from the form in which the database answers."""
        group, user = stored["run_group_id"], stored["user_id"]
        return cls(
            agent_id=stored["agent_id"],
            run_group_id=UUID(group) if group else None,
            user_id=UUID(user) if user else None,
            team=stored["team"],
        )
