"""Our packages install by path only: nothing on a public index, where others own the names, can take their place."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "plm-shared": "plm-shared",
    "plm-engine-core": "plm-engine-core",
    "plugin-substrate": "plugin-substrate",
    "plm-backend": "backend",
}
RESOLVE = [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run", "--no-index", "--no-build-isolation"]


def project(name: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / FOLDERS[name] / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(table["project"])


def pins_of(requirements: list[str]) -> dict[str, str]:
    """Which of ours are required, each with its specifier."""
    parsed = [Requirement(text) for text in requirements]
    return {each.name: str(each.specifier) for each in parsed if each.name in FOLDERS}


def resolve(*arguments: str, cwd: Path = ROOT / "backend") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RESOLVE, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def copy_of_ours(folder: Path) -> Path:
    """The files pip reads of our packages, to be changed by a test."""
    for name, module in zip(FOLDERS.values(), modules(), strict=True):
        (folder / name / module).mkdir(parents=True)
        (folder / name / module / "__init__.py").touch()
        shutil.copy(ROOT / name / "pyproject.toml", folder / name)
    shutil.copy(ROOT / "backend" / "requirements.txt", folder / "backend")
    return folder / "backend"


def foreign_wheel(folder: Path, name: str, version: str) -> None:
    """A package of the same name as somebody else would publish it."""
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def test_our_packages_resolve_by_path_with_the_index_switched_off() -> None:
    done = resolve("--quiet", "--report", "-", "-r", "requirements.txt")
    assert done.returncode == 0, done.stderr
    chosen = {
        item["metadata"]["name"]: (item["metadata"]["version"], item["download_info"]["url"])
        for item in json.loads(done.stdout)["install"]
    }
    assert chosen == {name: (project(name)["version"], (ROOT / FOLDERS[name]).as_uri()) for name in FOLDERS}


def test_a_pin_that_differs_from_the_version_in_the_next_folder_is_a_conflict(tmp_path: Path) -> None:
    backend = copy_of_ours(tmp_path)
    shared = tmp_path / "plm-shared" / "pyproject.toml"
    changed = shared.read_text(encoding="utf-8").replace('version = "0.1.0+platform"', 'version = "0.2.0+platform"')
    shared.write_text(changed, encoding="utf-8")
    done = resolve("-r", "requirements.txt", cwd=backend)
    assert done.returncode != 0
    assert re.search(r"conflicting dependencies|No matching distribution found for plm-shared", done.stderr)


@pytest.mark.parametrize("version", ["0.1.0", "0.1.0.post1", "99.0"])
def test_a_copy_on_an_index_never_satisfies_our_pins(tmp_path: Path, version: str) -> None:
    pins = pins_of(project("plm-backend")["dependencies"])
    for name, pin in pins.items():
        foreign_wheel(tmp_path, name, version)
        foreign = ["--no-deps", "--ignore-installed", "--find-links", str(tmp_path)]
        assert resolve(*foreign, name).returncode == 0, "without our pin it would be taken"
        refused = resolve(*foreign, name + pin)
        assert refused.returncode != 0
        assert f"No matching distribution found for {name}{pin}" in refused.stderr
    assert len(pins) == 3


@pytest.mark.parametrize("name", FOLDERS)
def test_every_pin_between_our_packages_names_the_local_version_of_the_other(name: str) -> None:
    extras = project(name).get("optional-dependencies", {})
    declared = [*project(name)["dependencies"], *(text for texts in extras.values() for text in texts)]
    assert pins_of(declared) == {other: f"=={project(other)['version']}" for other in pins_of(declared)}
    assert project(name)["version"].endswith("+platform")


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_installed_says_the_same_as_the_source(name: str) -> None:
    installed = importlib.metadata.distribution(name)
    assert installed.version == project(name)["version"]
    assert pins_of(installed.requires or []) == pins_of(project(name)["dependencies"])
    assert installed.metadata["Requires-Python"] == "<3.15,>=3.11"


def documents() -> list[Path]:
    """Everything that tells a person or a machine what to type."""
    places = [
        "*.md",
        "docs/**/*.md",
        "*/*.md",
        "*/docs/**/*.md",
        "Makefile",
        ".ci/run",
        ".github/workflows/*",
        "dev/*.py",
    ]
    sources = [f"{folder}/{package}/**/*.py" for folder, package in zip(FOLDERS.values(), modules(), strict=True)]
    return sorted({path for place in [*places, *sources] for path in ROOT.glob(place)})


def modules() -> list[str]:
    return [name.replace("-", "_") for name in FOLDERS]


def test_no_document_installs_one_of_ours_by_its_bare_name() -> None:
    names = "|".join(re.escape(name) for name in [*FOLDERS, *modules()])
    bare = re.compile(rf"\b(?:install|uv add|uvx|pipx run)\b[^\n]*[\s'\"`](?:{names})(?:\[[\w,]*\])?(?![\w/.-])")
    commands = re.compile(r"\b(?:pip|pipx|uv|uvx)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in documents()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if commands.search(line) and bare.search(line)
    ]
    assert found == []


def test_every_make_verb_that_a_document_names_exists() -> None:
    rules = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    verbs = {verb for rule in rules for verb in rule.split()}
    pages = [path for path in documents() if path.suffix == ".md"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= verbs
