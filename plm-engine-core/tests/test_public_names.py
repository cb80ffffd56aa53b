"""What the engine's packages export is what their lists say, sorted, and nothing else is public."""

from __future__ import annotations

import importlib
import pkgutil
import types

import plm_engine_core.agent_runtime
import plm_engine_core.control_plane
import pytest

PACKAGES = sorted(
    {
        found.name
        for root in (plm_engine_core.agent_runtime, plm_engine_core.control_plane)
        for found in [
            types.SimpleNamespace(name=root.__name__, ispkg=True),
            *pkgutil.walk_packages(root.__path__, f"{root.__name__}."),
        ]
        if found.ispkg and not found.name.rpartition(".")[2].startswith("_")
    }
)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_list_of_a_package_is_sorted_complete_and_true(name):
    package = importlib.import_module(name)
    public = {
        key
        for key, value in vars(package).items()
        if not key.startswith("_")
        and key not in ("annotations", "TYPE_CHECKING")
        and not isinstance(value, types.ModuleType)
    }
    public |= getattr(package, "_HOMES", {}).keys()  # loaded when they are first used
    assert all(hasattr(package, key) for key in package.__all__)
    assert sorted(package.__all__) == list(package.__all__) or sorted(package.__all__, key=_by_kind) == list(
        package.__all__
    )
    assert set(package.__all__) == public


def _by_kind(key: str) -> tuple[bool, bool, str]:
    """Constants, then classes, then functions: the order the linter keeps."""
    return not key.isupper(), not key[0].isupper(), key
