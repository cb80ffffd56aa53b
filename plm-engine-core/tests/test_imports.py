"""The two named import contracts once more, read from the source without the linter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import plm_engine_core
import pytest

PACKAGE = Path(plm_engine_core.__file__).parent


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, relative and type-checking imports included."""
    parents = ("plm_engine_core", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join((*start, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(folder: Path, forbidden: str) -> list[str]:
    return [
        f"{path}:{line} imports {name}"
        for path in sorted(folder.rglob("*.py"))
        for line, name in imports(path)
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]


def test_no_module_of_the_control_plane_imports_the_agent_runtime() -> None:
    assert violations(PACKAGE / "control_plane", "plm_engine_core.agent_runtime") == []


@pytest.mark.parametrize("forbidden", ["plm_accelerators", "plugin_substrate", "plm_backend"])
def test_no_module_of_the_engine_imports_what_stands_above_or_beside_it(forbidden: str) -> None:
    assert violations(PACKAGE, forbidden) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import plm_engine_core.agent_runtime",
        "import plm_engine_core.agent_runtime.driver as d",
        "from plm_engine_core import agent_runtime",
        "from plm_engine_core.agent_runtime import driver",
        "from ... import agent_runtime",
        "from ...agent_runtime import driver",
        "if TYPE_CHECKING:\n    from plm_engine_core import agent_runtime",
        "def late():\n    import plm_engine_core.agent_runtime",
    ],
)
def test_the_scan_sees_an_import_in_every_form(statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    folder = tmp_path / "control_plane" / "runs"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(statement, encoding="utf-8")
    assert len(violations(tmp_path, "plm_engine_core.agent_runtime")) == 1
