"""Runs everything that must pass, stage by stage: `.venv/bin/python dev/check.py [--only NAME ...] [--list]`.

`make test`, `make lint` and each CI job are calls of this program, so that the same checks run everywhere. A stage that
fails does not keep the next from running; the closing table names it, and the exit code is then 1. Needs only the
standard library, and takes the tools from the environment of the interpreter that runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent
PLUGINS_DIR = Path(os.environ.get("PLM_PLUGINS_DIR") or ROOT / ".state" / "test-plugins")
PACKAGES = {
    "plm-shared": "plm_shared",
    "plm-engine-core": "plm_engine_core",
    "plugin-substrate": "plugin_substrate",
    "backend": "plm_backend",
}
SCRIPTS = ["dev/*.py", "backend/*.py", "backend/scripts/*.py", "bench/*.py"]
EXAMPLES = {"bom-reader": "bom_reader", "license-reviewer": "license_reviewer", "report-writer": "report_writer"}

# Tests that start no server and no plugin, which the other interpreters run as well.
UNIT = [
    "plm-shared/tests/test_artifact_store.py",
    "plm-shared/tests/test_contracts.py",
    "plm-shared/tests/test_package.py",
    "plm-shared/tests/test_pricing.py",
    "plm-shared/tests/test_trace_and_tenant.py",
    "plm-engine-core/tests/test_decide.py",
    "plm-engine-core/tests/test_identity_context.py",
    "plm-engine-core/tests/test_identity_provider.py",
    "plm-engine-core/tests/test_operator_files.py",
    "plm-engine-core/tests/test_plan.py",
    "plm-engine-core/tests/test_public_names.py",
    "plugin-substrate/tests/test_plugin_frames.py",
    "plugin-substrate/tests/test_plugin_interface.py",
    "plugin-substrate/tests/test_plugin_manifest.py",
    "plugin-substrate/tests/test_plugin_values.py",
]

# Most tests wait: for processes, locks and leases. The tests of one file stay together and share what they started.
SIDE_BY_SIDE = ["-n", "2", "--dist", "loadfile"]

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
names = []
for package in sys.argv[1:]:
    paths = importlib.import_module(package).__path__
    names += [package, *(found.name for found in pkgutil.walk_packages(paths, package + "."))]
wanted = [name for name in names if not name.endswith("__main__") and ".migrations." not in name]
for name in wanted:
    importlib.import_module(name)
print(len(wanted), "modules imported on Python", sys.version.split()[0])
"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands that pass or fail together; ``group`` is its CI job, ``default`` says whether `make test` runs it."""

    name: str
    group: str
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    default: bool = True


def stages() -> list[Stage]:
    """Every stage, in the order they run."""
    return [*lint_stages(), *test_stages(), *portability_stages()]


def lint_stages() -> list[Stage]:
    """What is checked without running the product."""
    scripts = [str(path.relative_to(ROOT)) for place in SCRIPTS for path in sorted(ROOT.glob(place))]
    contracts = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/.importlinter"))
    return [
        Stage(name="plugin-environments", group="guardrails", commands=[install_examples()]),
        Stage(
            name="ruff",
            group="guardrails",
            commands=[tool("ruff", "check", "."), tool("ruff", "format", "--check", ".")],
        ),
        Stage(name="mypy", group="guardrails", commands=[tool("mypy"), tool("mypy", *scripts)]),
        Stage(
            name="mypy-plugins",
            group="guardrails",
            commands=[check_example(name, package) for name, package in EXAMPLES.items()],
            environment={"MYPYPATH": str(ROOT / "plugin-substrate")},
        ),
        Stage(
            name="import-contracts",
            group="guardrails",
            commands=[tool("lint-imports", "--no-logo", "--config", str(path)) for path in contracts],
        ),
        Stage(name="architecture", group="guardrails", commands=[python("backend/scripts/architecture_guardrails.py")]),
    ]


def test_stages() -> list[Stage]:
    """One suite per package, and the example plugins, which all share one installation."""
    suites = [
        Stage(
            name=f"{folder}-tests",
            group=f"{folder}-tests",
            commands=[pytest(f"{folder}/tests", *SIDE_BY_SIDE)],
            environment={"RUN_LINTER_NEGATIVE": "1", "PLM_PLUGINS_DIR": str(PLUGINS_DIR)},
        )
        for folder in PACKAGES
    ]
    examples = Stage(
        name="example-plugins",
        group="plugin-substrate-tests",
        commands=[pytest("dev/plugins/tests")],
        environment={"PLM_PLUGINS_DIR": str(PLUGINS_DIR)},
    )
    return [*suites, examples]


def portability_stages() -> list[Stage]:
    """What the other interpreters run: parts of the suites above, so not again on the first."""
    everything = [sys.executable, "-W", "error", "-c", IMPORT_EVERYTHING, *PACKAGES.values()]
    return [
        Stage(name="imports", group="portability", commands=[everything], default=False),
        Stage(name="unit-tests", group="portability", commands=[pytest(*UNIT)], default=False),
    ]


def tool(name: str, *arguments: str) -> list[str]:
    """A command of this interpreter's environment."""
    return [str(TOOLS / name), *arguments]


def python(*arguments: str) -> list[str]:
    """A script."""
    return [sys.executable, *arguments]


def pytest(*paths: str) -> list[str]:
    """A pytest run of its own; it starts in the root, whose settings make warnings errors."""
    return [sys.executable, "-m", "pytest", "-q", *paths]


def install_examples() -> list[str]:
    """The example plugins, installed as users install them; they are kept for the next time."""
    return tool("cjm-ctl", "install-all", "--plugins", "dev/plugins.yaml", "--data-dir", str(PLUGINS_DIR))


def check_example(name: str, package: str) -> list[str]:
    """Mypy over an example plugin, with the libraries of the plugin's own environment."""
    interpreter = PLUGINS_DIR / "envs" / name / "bin" / "python"
    options = [
        "--disable-error-code=import-untyped",  # some of their libraries come without types
        "--follow-imports=silent",  # the host's side of plugin_substrate needs what no plugin has
    ]
    return tool("mypy", *options, "--python-executable", str(interpreter), f"dev/plugins/{package}/{package}")


def run(stage: Stage) -> bool:
    """Run the commands of a stage, all of them, and say whether all passed."""
    passed = True
    for command in stage.commands:
        say(f"$ {' '.join(shorten(part) for part in command)}")
        environment = {**os.environ, **stage.environment}
        passed = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0 and passed
    return passed


def shorten(part: str) -> str:
    """A part of a command as the reader would type it."""
    return "'...'" if "\n" in part else part.replace(f"{ROOT}{os.sep}", "")


def chosen(names: list[str]) -> list[Stage]:
    """The stages of these names or groups; without names, those of `make test`."""
    known = stages()
    words = {stage.name for stage in known} | {stage.group for stage in known}
    if unknown := [name for name in names if name not in words]:
        sys.exit(f"check: no stage {', '.join(unknown)}; there are {', '.join(sorted(words))}.")
    return [stage for stage in known if (stage.name in names or stage.group in names) or (stage.default and not names)]


def table(times: dict[str, float], failed: list[str]) -> str:
    """The closing table."""
    rows = [f"{'stage':<24} {'seconds':>8}"]
    rows += [f"{name:<24} {took:>8.1f}{'  FAILED' if name in failed else ''}" for name, took in times.items()]
    rows.append(f"{'all':<24} {sum(times.values()):>8.1f}")
    return "\n".join(rows)


def installed() -> str:
    """How much the set-up has installed: its own record, and the plugins' environments."""
    record = Path(sys.prefix) / "plm-setup.json"
    size = json.loads(record.read_text(encoding="utf-8"))["bytes"] if record.exists() else "an unknown number of"
    plugins = sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(PLUGINS_DIR) for name in names)
    return f"installed: {size} bytes in {Path(sys.prefix).name}, {plugins} bytes of plugins"


def say(text: str) -> None:
    """Print in order with what the tools print."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run what is asked for; 0 when all of it passed."""
    parser = argparse.ArgumentParser(description="Run everything that must pass, or a part of it.")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a stage or a group of them; repeat"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    selection = chosen(arguments.only)
    if arguments.list:
        say("\n".join(f"{stage.group}: {stage.name}" for stage in stages()))
        return 0
    times: dict[str, float] = {}
    failed: list[str] = []
    for stage in selection:
        say(f"\n== {stage.name}")
        started = time.monotonic()
        if not run(stage):
            failed.append(stage.name)
        times[stage.name] = time.monotonic() - started
    say(f"\n{table(times, failed)}")
    say(installed())
    say(f"failed: {', '.join(failed)}" if failed else "everything passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
