"""The package's shape: what it exports, what it needs, whom it may import."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import inspect
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import plm_shared
import pytest

PACKAGE = Path(__file__).parents[1]
NEEDS_A_DATABASE = {
    "plm_shared.async_kernel_emitter",
    "plm_shared.batching_emitter",
    "plm_shared.db",
    "plm_shared.doctor",
    "plm_shared.embedded_postgres",
    "plm_shared.ledger_writer",
    "plm_shared.migrations",
    "plm_shared.provisioning",
    "plm_shared.schema_lint",
    "plm_shared.sqlalchemy_kernel_emitter",
    "plm_shared.tables",
    "plm_shared.tenancy_remedies",
    "plm_shared.testing",
}
MODULES = sorted(f"plm_shared.{module.name}" for module in pkgutil.iter_modules(plm_shared.__path__))
BASE = [name for name in MODULES if name not in NEEDS_A_DATABASE]


def test_the_top_exports_the_version_only_and_it_is_the_installed_one() -> None:
    assert plm_shared.__all__ == ["__version__"]
    assert plm_shared.__version__ == importlib.metadata.version("plm-shared")


@pytest.mark.parametrize("name", MODULES)
def test_the_export_list_is_sorted_and_equals_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert listed == sorted(listed, key=lambda text: (not text.isupper(), not text[0].isupper(), text))
    assert len(listed) == len(set(listed))
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == name
    }
    assert own <= set(listed), f"public but not listed: {own - set(listed)}"
    for key in listed:
        assert hasattr(module, key)


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_class_and_function_says_what_it_does(name: str) -> None:
    module = importlib.import_module(name)
    for key in getattr(module, "__all__", []):
        value = getattr(module, key)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{key}"


def test_the_base_install_works_without_drivers_and_web_frameworks() -> None:
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"sqlalchemy", "psycopg", "alembic", "boto3", "starlette", "fastapi", "pytest"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import importlib
for name in {BASE!r}:
    importlib.import_module(name)
from plm_shared.artifact_store import ObjectStoreBackend
try:
    ObjectStoreBackend(bucket="b")
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "plm-shared[s3]" in said


def test_the_migrations_and_the_catalogue_are_in_the_package() -> None:
    folder = Path(plm_shared.__file__).parent
    assert len(list((folder / "migrations" / "versions").glob("0*.py"))) == 12
    assert (folder / "migrations" / "script.py.mako").exists()
    assert (folder / "capabilities.yaml").exists()


def test_the_import_contracts_hold() -> None:
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert linter is not None
    done = subprocess.run(
        [linter, "--config", ".importlinter", "--no-cache"], cwd=PACKAGE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contract_about_drivers_covers_every_module_that_needs_none() -> None:
    contract = configparser.ConfigParser()
    contract.read(PACKAGE / ".importlinter")
    sources = contract["importlinter:contract:drivers"]["source_modules"].split()
    assert sorted(sources) == BASE
