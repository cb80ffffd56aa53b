"""What a knowledge call brings back: an answer with its sources. A later version is a new type beside this one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["KnowledgeEnvelopeV1", "KnowledgeSourceRef"]


class KnowledgeSourceRef(BaseModel):
    """Where a statement comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    ref_id: str
    ref_type: str
    title: str | None = None
    locator: str | None = None


class KnowledgeEnvelopeV1(BaseModel):
    """Version 1.0 of the envelope."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    schema_version: Literal["1.0"] = "1.0"
    primitive: str
    capability: str
    baseline_version: str
    source_refs: list[KnowledgeSourceRef] = Field(default_factory=list)
    evidence_refs: list[KnowledgeSourceRef] = Field(default_factory=list)
    payload: dict[str, Any] = Field(default_factory=dict)
    outcome: str
    error_code: str | None = None
