from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugin_substrate.interface import InputFile, OutputFile
from plugin_substrate.manager import PluginManager

Call = Callable[..., Any]


def resolved(value: Any, known: dict[str, Any]) -> Any:
    """Put what is known in the place of every ``{ref: path}``."""
    if isinstance(value, dict) and value.keys() == {"ref"}:
        found = known
        for step in value["ref"].split("."):
            found = found[step]
        return found
    return {key: resolved(one, known) for key, one in value.items()} if isinstance(value, dict) else value


def test_every_plugin_declares_itself_repeatable_and_only_the_writer_keeps_state(manager: PluginManager) -> None:
    found = {meta.name: (meta.capabilities, meta.idempotent, meta.stateless) for meta in manager.discover_manifests()}
    assert found == {
        "bom-reader": (("bom.read",), True, True),
        "license-reviewer": (("bom.review",), True, True),
        "report-writer": (("bom.report", "bom.quarantine"), True, False),
    }


@pytest.mark.parametrize("name", ["environment.cdx.json", "assembly.csv"])
def test_the_plan_runs_over_each_sample(
    call: Call, sample: Callable[[str], InputFile], plan_path: Path, name: str
) -> None:
    plan = yaml.safe_load(plan_path.read_text(encoding="utf-8"))
    inputs = {key: declared.get("default") for key, declared in plan["inputs"].items()}
    known: dict[str, Any] = {"inputs": {**inputs, "bom": sample(name)}, "steps": {}}
    for step in plan["steps"]:
        output = call(step["capability"], step_key=uuid.uuid4().hex, **resolved(step["arguments"], known))
        known["steps"][step["id"]] = {"output": output}
    result = resolved(plan["result"], known)
    assert all(isinstance(result[key], OutputFile) for key in ("report", "chart", "list"))
    assert result["summary"]["blocking"] > 0
    assert name in result["report"].data.decode()
