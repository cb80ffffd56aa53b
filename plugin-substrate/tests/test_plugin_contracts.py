from __future__ import annotations

import ast
import importlib
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import plugin_substrate
import pytest
from importlinter.cli import lint_imports
from plugin_substrate import PluginError, errors

PACKAGE = Path(plugin_substrate.__file__).parent
PROJECT = PACKAGE.parent


@pytest.fixture
def loggers_as_they_were() -> Iterator[None]:
    """The linter configures logging, which switches off every logger there is."""
    before = {name: logging.getLogger(name).disabled for name in logging.root.manager.loggerDict}
    yield
    for name, disabled in before.items():
        logging.getLogger(name).disabled = disabled


@pytest.mark.usefixtures("loggers_as_they_were")
def test_the_import_contracts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    assert lint_imports(config_filename=str(PROJECT / ".importlinter"), no_cache=True) == 0


def test_what_runs_in_a_plugins_process_imports_only_the_standard_library() -> None:
    """The contract above lists what is known; this finds what nobody thought of."""
    files = [
        PACKAGE / "interface.py",
        PACKAGE / "errors.py",
        PACKAGE / "file_plugin.py",
        PACKAGE / "validation.py",
        *sorted((PACKAGE / "worker").glob("*.py")),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in {*sys.stdlib_module_names, "plugin_substrate"}, f"{file}: {name}"


@pytest.mark.parametrize(
    "name", ["plugin_substrate", "plugin_substrate.passes", "plugin_substrate.queue", "plugin_substrate.testing"]
)
def test_the_list_of_exports_is_sorted_complete_and_true(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        attribute
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")
        and not inspect.ismodule(value)
        and (getattr(value, "__module__", "") or "").startswith("plugin_substrate")
        and attribute != "annotations"
    }
    assert module.__all__ == sorted(module.__all__)
    assert set(module.__all__) == public


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    def lines(cls: type, depth: int) -> list[tuple[int, str]]:
        below = [line for child in cls.__subclasses__() for line in lines(child, depth + 1)]
        return [(depth, cls.__name__), *below] if cls.__module__ == "plugin_substrate.errors" else []

    drawn = [line for line in (errors.__doc__ or "").splitlines() if "Error  " in line]
    assert [((line.index(line.strip("│├└─ ")[0]) - 4) // 4, line.strip("│├└─ ").split()[0]) for line in drawn] == lines(
        PluginError, 0
    )


def test_the_example_in_the_readme_is_a_plugin_that_works(tmp_path: Path) -> None:
    from plugin_substrate.testing import run_in_process

    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    example = next(block for block in text.split("```python\n") if "class WordCount" in block).split("```")[0]
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)  # noqa: S102 - the README is ours
    plugin_class = namespace["WordCount"]
    assert isinstance(plugin_class, type)
    plugin = plugin_class()
    plugin.initialize({})
    assert run_in_process(plugin, action="text.count", text="to be or not to be").value == {"words": 6, "distinct": 4}
