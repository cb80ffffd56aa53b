"""The examples of the README and of the library's page run, and name everything that is public."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import plm_engine_core
import plm_engine_core.agent_runtime
import plm_engine_core.control_plane
import pytest


def examples(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(package_root):
    return (package_root.parent / "docs" / "library.md").read_text(encoding="utf-8")


def ran(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_of_the_page_run_one_after_the_other(page):
    ran("\n".join(examples(page)))


def test_the_first_page_governs_a_function_in_five_lines(package_root):
    readme = (package_root.parent / "README.md").read_text(encoding="utf-8")
    (example,) = examples(readme)
    statements = [line for line in example.splitlines() if line.strip() and not line.startswith(("#", "from "))]
    assert len(statements) == 5
    assert ran(example) == "there are 12 of bolt\n"


def test_the_page_has_an_example_of_everything_public(page):
    code = "\n".join(examples(page))
    names = {*plm_engine_core.__all__, *plm_engine_core.control_plane.__all__}
    missing = [name for name in names if not re.search(rf"\b{name}\b", code)]
    assert missing == [], "give each an example in docs/library.md"


PUBLIC_CLASSES = sorted(
    {
        (package.__name__, name)
        for package in (plm_engine_core, plm_engine_core.control_plane, plm_engine_core.agent_runtime)
        for name in package.__all__
        if inspect.isclass(getattr(package, name))
    }
)


def own_methods(cls):
    """The public methods that a user finds on a class of ours, without what it has from elsewhere."""
    return {
        name
        for base in cls.__mro__
        if base.__module__.startswith("plm_")
        for name, value in vars(base).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod | staticmethod))
    }


@pytest.mark.parametrize(("package", "name"), PUBLIC_CLASSES)
def test_the_page_has_an_example_of_every_public_method_of_every_public_class(page, package, name):
    code = "\n".join(examples(page))
    methods = own_methods(getattr(importlib.import_module(package), name))
    # Called, or, of what a user writes, defined.
    missing = [method for method in sorted(methods) if not re.search(rf"(\.|def ){method}\(", code)]
    assert missing == [], "give each an example in docs/library.md, or make it private"


IN_A_SERVER = {"open_pool"}  # shown on the page, and run by every test that has a database


def test_the_page_has_an_example_of_every_public_function_of_a_part(page):
    code = "\n".join(examples(page))
    root = plm_engine_core.control_plane
    parts = [found.name for found in pkgutil.walk_packages(root.__path__, f"{root.__name__}.") if found.ispkg]
    parts.append(plm_engine_core.agent_runtime.__name__)
    functions = {
        name
        for part in map(importlib.import_module, parts)
        for name in getattr(part, "__all__", ())
        if inspect.isfunction(getattr(part, name))
    }
    missing = [name for name in functions - IN_A_SERVER if not re.search(rf"\b{name}\(", code)]
    assert missing == [], "give each an example in docs/library.md"


def test_every_public_name_of_the_package_is_there_and_no_other():
    assert sorted(plm_engine_core.__all__) == list(plm_engine_core.__all__)
    for name in plm_engine_core.__all__:
        found = getattr(plm_engine_core, name)
        assert found.__name__ == name
        assert found.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        plm_engine_core.nothing  # noqa: B018  # the look is the point


def test_importing_the_package_alone_loads_nothing_else():
    code = "import sys, plm_engine_core; print([n for n in sys.modules if n.startswith('plm_engine_core.')])"
    assert ran(code) == "[]\n"
