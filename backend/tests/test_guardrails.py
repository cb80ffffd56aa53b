"""The guardrail script finds what it must, where it is, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "architecture_guardrails.py"
INSERT = 'SQL = "INSERT INTO telemetry_events (id) VALUES (1)"\n'
IMPORT = "from plm_engine_core.control_plane.identity import with_system_identity\n"


def check(root: Path, *options: str) -> tuple[int, list[str]]:
    command = [sys.executable, SCRIPT, "--root", root, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_this_repository_passes() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO telemetry_events",
        "insert  into\n   llm_calls",
        'INSERT INTO "connector_calls"',
        "INSERT INTO public.pricing_snapshots",
    ],
)
@pytest.mark.parametrize("path", ["pkg/store.py", "pkg/store.sql"])
def test_bl5_warns_of_a_raw_insert_and_fails_only_when_strict(tmp_path: Path, statement: str, path: str) -> None:
    put(tmp_path, path, f'\nSQL = """{statement} VALUES (1)"""\n')
    status, lines = check(tmp_path)
    assert status == 0
    assert lines[0].startswith(f"BL5 {path}:2 raw INSERT INTO")
    assert lines[0].endswith("(warning)")
    status, lines = check(tmp_path, "--strict")
    assert status == 1
    assert "(warning)" not in lines[0]


@pytest.mark.parametrize(
    "path",
    [
        "plm-shared/plm_shared/kernel_api.py",
        "plm-shared/plm_shared/sqlalchemy_kernel_emitter.py",
        "plm-shared/plm_shared/migrations/versions/0099_fill.py",
    ],
)
def test_bl5_lets_the_emitter_and_the_migrations_write(tmp_path: Path, path: str) -> None:
    put(tmp_path, path, INSERT)
    assert check(tmp_path, "--strict") == (0, [])


@pytest.mark.parametrize(
    "text",
    ["INSERT INTO telemetry_events_archive", "SELECT FROM telemetry_events", "INSERT INTO runs -- llm_calls"],
)
def test_bl5_leaves_other_statements_alone(tmp_path: Path, text: str) -> None:
    put(tmp_path, "pkg/store.py", f'SQL = "{text}"\n')
    assert check(tmp_path, "--strict") == (0, [])


def test_bl5_is_not_fooled_by_a_namesake_of_the_emitter(tmp_path: Path) -> None:
    put(tmp_path, "plm_backend/kernel_api.py", INSERT)
    assert check(tmp_path, "--strict")[0] == 1


@pytest.mark.parametrize(
    "use",
    [
        IMPORT,
        "from plm_engine_core.control_plane.identity import with_system_identity as quiet\n",
        "from plm_engine_core.control_plane.identity.system import with_system_identity\n",
        "from .system import with_system_identity\n",
        "from plm_engine_core.control_plane.identity import *\n",
        "import plm_engine_core.control_plane.identity as i; i.with_system_identity(tenant_id=1)\n",
        "from plm_engine_core.control_plane.identity import system; act = system.with_system_identity\n",
        'import x; act = getattr(x, "with_system_identity")\n',
        "from plm_engine_core.control_plane.identity import SystemIdentities\n",
        "import plm_engine_core.control_plane.identity as i; i.SystemIdentities(None)\n",
        f"def late():\n    {IMPORT}",
        f"if TYPE_CHECKING:\n    {IMPORT}",
    ],
)
def test_bl6_sees_every_way_to_the_system_identity(tmp_path: Path, use: str) -> None:
    put(tmp_path, "plm_backend/jobs.py", use)
    status, lines = check(tmp_path)
    assert status == 1
    line = 2 if use.startswith(("def", "if")) else 1
    assert all(found.startswith(f"BL6 plm_backend/jobs.py:{line} ") for found in lines)


@pytest.mark.parametrize(
    "path",
    [
        "plm-engine-core/plm_engine_core/control_plane/identity/system.py",
        "plm-engine-core/plm_engine_core/control_plane/identity/__init__.py",
        "plm-engine-core/plm_engine_core/cli/run.py",
        "plm-engine-core/plm_engine_core/control_plane/recovery.py",
        "backend/plm_backend/wiring.py",
        "backend/tests/test_jobs.py",
    ],
)
def test_bl6_lets_the_allowed_places_use_it(tmp_path: Path, path: str) -> None:
    put(tmp_path, path, IMPORT)
    assert check(tmp_path) == (0, [])


def test_bl6_leaves_comments_and_docstrings_alone(tmp_path: Path) -> None:
    put(tmp_path, "pkg/a.py", '"""Never calls with_system_identity."""\n# with_system_identity\nfrom m import *\n')
    assert check(tmp_path) == (0, [])


def test_one_rule_can_be_chosen(tmp_path: Path) -> None:
    put(tmp_path, "pkg/a.py", INSERT + IMPORT)
    assert check(tmp_path, "--rule", "BL5")[0] == 0
    status, lines = check(tmp_path, "--rule", "BL6")
    assert (status, len(lines)) == (1, 1)


def test_what_tools_leave_behind_is_not_read(tmp_path: Path) -> None:
    for folder in (".venv", "build", ".git", "__pycache__"):
        put(tmp_path, f"{folder}/a.py", IMPORT)
    assert check(tmp_path) == (0, [])


def test_wrong_usage_and_unreadable_files_end_with_2(tmp_path: Path) -> None:
    assert check(tmp_path / "missing")[0] == 2
    assert check(tmp_path, "--rule", "BL7")[0] == 2
    put(tmp_path, "pkg/a.py", "def :\n")
    assert check(tmp_path)[0] == 2
