from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

import pytest
from plugin_substrate import PluginConfigError, PluginFatalError, PluginManager, load_manifest
from plugin_substrate.cli import app
from plugin_substrate.environments.install import compile_our_files
from plugin_substrate.environments.spec import PluginSpec, load_plugins_file
from plugin_substrate.environments.uv import find_interpreter
from plugin_substrate.worker import runtime
from typer.testing import CliRunner, Result

PYPROJECT = """
[build-system]
requires = ["hatchling>=1.26,<2"]
build-backend = "hatchling.build"

[project]
name = "tiny-plugin"
version = "0.1"

[tool.hatch.build.targets.wheel]
packages = ["tiny"]
"""

META = """
def get_plugin_metadata():
    return {
        "name": "tiny",
        "version": "0.1",
        "description": "Answers.",
        "module": "tiny.plugin",
        "class": "Tiny",
        "interface": "plugin_substrate.interface.PluginInterface",
        "idempotent": True,
        "stateless": True,
        "capabilities": ["tiny.answer"],
    }
"""

LAST_KEY = '"capabilities"'
UNUSABLE_SCHEMA = '"config_schema": {"properties": {"answer": {"type": "number of things"}}}, '

PLUGIN = """
from dataclasses import dataclass

from plugin_substrate.interface import PluginInterface, plugin_action

@dataclass
class Settings:
    answer: int = 42

class Tiny(PluginInterface):
    name = "tiny"
    version = "0.1"
    config_class = Settings

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    @plugin_action("tiny.answer")
    def answer(self):
        return self.config["answer"]
"""


class Workspace:
    """A folder with a plugin and a plugins file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.package = folder / "tiny-plugin" / "tiny"
        self.package.mkdir(parents=True)
        (self.package.parent / "pyproject.toml").write_text(PYPROJECT)
        (self.package / "__init__.py").touch()
        (self.package / "meta.py").write_text(META)
        (self.package / "plugin.py").write_text(PLUGIN)
        self.plugins = folder / "plugins.yaml"
        self.plugins.write_text("plugins:\n  - name: tiny\n    env_name: tiny\n    package: ./tiny-plugin\n")

    def install(self, *options: str) -> Result:
        """Run ``cjm-ctl install-all``."""
        command = ["install-all", "--plugins", str(self.plugins), "--data-dir", str(self.data_dir), *options]
        return CliRunner().invoke(app, command, catch_exceptions=False)

    @property
    def mark(self) -> Path:
        """A file in the environment: gone when that is made anew."""
        return self.data_dir / "envs" / "tiny" / "mark"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace with the tiny plugin."""
    return Workspace(tmp_path)


async def test_an_installed_plugin_is_described_by_itself_and_can_be_called(workspace: Workspace) -> None:
    done = workspace.install()
    assert (done.exit_code, done.output) == (0, "tiny: installed\n")
    assert workspace.data_dir.stat().st_mode & 0o777 == 0o711
    manifest = load_manifest(workspace.data_dir / "manifests/tiny.json")
    assert (manifest.code.capabilities, manifest.code.idempotent, manifest.code.stateless) == (
        ("tiny.answer",),
        True,
        True,
    )
    listed = CliRunner().invoke(app, ["list", "--json", "--data-dir", str(workspace.data_dir)])
    assert [plugin["name"] for plugin in json.loads(listed.output)["plugins"]] == ["tiny"]
    async with PluginManager(data_dir=workspace.data_dir) as manager:
        (meta,) = manager.discover_manifests()
        await manager.load_plugin_async(meta)
        assert await manager.execute_plugin_async("tiny", action="tiny.answer") == 42
        await manager.reconfigure_async("tiny", {"answer": 43})
        assert await manager.execute_plugin_async("tiny", action="tiny.answer") == 43
        with pytest.raises(PluginConfigError, match="answer"):
            await manager.reconfigure_async("tiny", {"answer": "many"})
        tiny = manager.get_plugin_meta("tiny")
        assert tiny is not None
        assert not tiny.config_schema_drift


def test_libraries_that_plugin_and_host_both_need_are_installed_in_both(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = workspace.folder / "common"
    common.mkdir()
    (common / "pyproject.toml").write_text(PYPROJECT.replace("tiny", "common_interface"))
    (common / "common_interface").mkdir()
    (common / "common_interface" / "__init__.py").touch()
    plain = workspace.plugins.read_text()
    workspace.plugins.write_text(plain + "    interface_libs: [./common]\n")
    assert workspace.install().output == "tiny: installed\n"
    assert list((workspace.data_dir / "envs" / "tiny").rglob("site-packages/common_interface"))
    assert workspace.install().output == "tiny: unchanged\n"
    host = workspace.folder / "host"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(host)], check=True)
    monkeypatch.setattr(sys, "executable", str(host / "bin" / "python"))
    command = ["setup-host", "--plugins", str(workspace.plugins)]
    assert CliRunner().invoke(app, command, input="n\n").exit_code == 0
    assert not list(host.rglob("common_interface"))
    done = CliRunner().invoke(app, [*command, "--yes"])
    assert (done.exit_code, done.output) == (0, f"installed: {common}\n")
    assert list(host.rglob("site-packages/common_interface"))
    workspace.plugins.write_text(plain)
    assert CliRunner().invoke(app, command).output == "no plugin names interface_libs\n"
    workspace.plugins.write_text(plain + "    interface_libs: common\n")
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, "line 5: interface_libs must be a list" in refused.stderr) == (1, True)


def test_a_folder_that_is_no_project_is_named_with_what_it_should_be(workspace: Workspace) -> None:
    (workspace.package.parent / "pyproject.toml").unlink()
    done = workspace.install()
    assert done.exit_code == 1
    assert "pyproject.toml cannot be read: No such file or directory; a plugin is a Python project" in done.output


def test_what_a_plugin_asks_for_and_is_not_granted_is_told_at_installation(workspace: Workspace) -> None:
    asking = META.replace('"idempotent": True', '"isolation": {"network": True}, "idempotent": True')
    (workspace.package / "meta.py").write_text(asking)
    for status in ("installed", "unchanged"):
        done = workspace.install()
        assert done.exit_code == 0
        assert done.output.startswith(f"tiny: {status}: plugin 'tiny' asks for more than it is granted")
        assert "network: true" in done.output
    workspace.plugins.write_text(workspace.plugins.read_text() + "    isolation: {network: true}\n")
    assert workspace.install().output == "tiny: granted\n"


def test_a_configuration_schema_that_cannot_be_used_is_found_at_installation(workspace: Workspace) -> None:
    (workspace.package / "meta.py").write_text(META.replace(LAST_KEY, UNUSABLE_SCHEMA + LAST_KEY))
    done = workspace.install()
    assert done.exit_code == 1
    assert "the config_schema of plugin 'tiny' cannot be used: properties.answer.type" in done.output
    assert not (workspace.data_dir / "manifests/tiny.json").exists()


def test_a_grant_is_seen_without_installing_anew(workspace: Workspace) -> None:
    workspace.install()
    workspace.mark.touch()
    plain = workspace.plugins.read_text()
    workspace.plugins.write_text(plain + "    isolation: {network: true}\n    require: [rlimits]\n")
    assert workspace.install().output == "tiny: granted\n"
    assert workspace.install().output == "tiny: unchanged\n"
    manifest = load_manifest(workspace.data_dir / "manifests/tiny.json")
    assert (manifest.granted_isolation.network, manifest.required_layers) == (True, ("rlimits",))
    assert workspace.install("--force").output == "tiny: installed\n"
    assert load_manifest(workspace.data_dir / "manifests/tiny.json").granted_isolation.network
    workspace.plugins.write_text(plain)
    assert workspace.install().output == "tiny: granted\n"
    assert load_manifest(workspace.data_dir / "manifests/tiny.json").overrides == {}


def test_nothing_of_ours_is_installed_in_the_plugins_environment(workspace: Workspace) -> None:
    workspace.install()
    python = load_manifest(workspace.data_dir / "manifests/tiny.json").install.python_path
    ours = subprocess.run([python, "-I", "-c", "import plugin_substrate"], capture_output=True, check=False)
    assert b"ModuleNotFoundError" in ours.stderr


def test_a_second_run_does_nothing_a_changed_source_is_installed_and_force_makes_all_anew(
    workspace: Workspace,
) -> None:
    workspace.install()
    workspace.mark.touch()
    assert workspace.install().output == "tiny: unchanged\n"
    meta = workspace.package / "meta.py"
    meta.write_text(META.replace("Answers.", "Answers again."))
    assert workspace.install().output == "tiny: installed\n"
    assert load_manifest(workspace.data_dir / "manifests/tiny.json").code.description == "Answers again."
    assert workspace.mark.exists(), "only the package was installed again"
    assert workspace.install("--force").output == "tiny: installed\n"
    assert not workspace.mark.exists()


FORGED_ANSWER = """
import os, sys
os.write(int(sys.argv[2]), (%s).encode())
os._exit(0)
"""

BROKEN = [
    ("meta.py", META.replace("def get_plugin_metadata", "def other"), "no function get_plugin_metadata"),
    ("meta.py", "raise RuntimeError('broken meta')", "RuntimeError: broken meta"),
    ("meta.py", META.replace('"name": "tiny"', '"name": "huge"'), "calls itself 'huge'"),
    ("meta.py", META.replace('"idempotent": True', '"idempotent": "yes"'), "code.idempotent must be true or false"),
    ("meta.py", META.replace("tiny.answer", "tiny.other"), "differ in: tiny.answer, tiny.other"),
    ("meta.py", META.replace('"Tiny"', '"Absent"'), "tiny.plugin.Absent is not a class derived from"),
    ("meta.py", META.replace('"stateless"', '"statless"'), "unknown keys: statless"),
    ("plugin.py", PLUGIN.replace("import dataclass\n", "import dataclas\n"), "/tiny/plugin.py, line 2)"),
    ("plugin.py", PLUGIN.replace("def execute", "def other"), "does not implement execute"),
    ("plugin.py", "import os\nos._exit(5)", "gave no answer"),
    ("meta.py", "raise RuntimeError('\\x1b[31mred')", "RuntimeError: \\x1b[31mred"),
    ("meta.py", META.replace("Answers.", "Answers.\\x1b[31m"), "code.description must be one printable line"),
    ("meta.py", FORGED_ANSWER % '"[" * 100000', "gave no answer"),
    ("meta.py", FORGED_ANSWER % """'{"metadata": {"resources": {"ram": 1e999}}}'""", "gave no answer"),
]


def test_a_plugin_that_cannot_be_used_is_refused_with_its_reason_and_leaves_no_manifest(workspace: Workspace) -> None:
    workspace.install()
    for file, content, reason in BROKEN:
        (workspace.package / file).write_text(content)
        done = workspace.install()
        assert done.exit_code == 1
        assert reason in done.output
        assert not (workspace.data_dir / "manifests/tiny.json").exists()
        (workspace.package / "meta.py").write_text(META)
        (workspace.package / "plugin.py").write_text(PLUGIN)
    assert workspace.install().exit_code == 0


def test_a_failing_plugin_does_not_keep_the_others_from_being_installed(workspace: Workspace) -> None:
    others = "  - {name: ghost, env_name: ghost, package: ./nowhere}\n"
    workspace.plugins.write_text(workspace.plugins.read_text().replace("plugins:\n", "plugins:\n" + others))
    done = workspace.install()
    assert done.exit_code == 1
    assert "ghost: failed: the package folder" in done.output
    assert "tiny: installed" in done.output


def test_an_interpreter_that_is_not_there_is_named_and_never_downloaded(workspace: Workspace) -> None:
    workspace.plugins.write_text(workspace.plugins.read_text() + '    python_version: "3.1"\n')
    done = workspace.install()
    assert done.exit_code == 1
    assert "python3.1 is not on the PATH" in done.output


def interpreter(path: Path, *, answers: str) -> Path:
    """Make a program that gives a Python's version and path, or fails as a shim does that has no such version."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{f'echo {answers} $0' if answers else 'exit 127'}\n")
    path.chmod(0o755)
    return path


def test_an_interpreter_is_one_that_runs_and_not_a_shim_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = interpreter(tmp_path / "shims" / "python3.99", answers="")
    other = interpreter(tmp_path / "other" / "python3.99", answers="3.98")
    monkeypatch.setenv("PATH", os.pathsep.join([str(shim.parent), str(other.parent), "/usr/bin", "/bin"]))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    with pytest.raises(PluginFatalError, match=r"python3\.99 is not on the PATH"):
        find_interpreter("3.99")
    installed = interpreter(tmp_path / "pyenv" / "versions" / "3.99.1" / "bin" / "python3.99", answers="3.99")
    assert find_interpreter("3.99") == installed
    real = interpreter(tmp_path / "real" / "python3.99", answers="3.99")
    monkeypatch.setenv("PATH", os.pathsep.join([str(shim.parent), str(real.parent), "/usr/bin", "/bin"]))
    assert find_interpreter("3.99") == real


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("plugins: 3", "must have a list 'plugins'"),
        ("", "line 1: the top level must be a mapping"),
        ("plugins: []\nplugin: []", "line 2: unknown key 'plugin'"),
        ("plugins:\n- name: a\n  env_name: b\n  package: c\n  pakage: d", "line 5: unknown key 'pakage'"),
        ("plugins:\n- name: a\n  package: c", "line 2: env_name is missing"),
        ("plugins:\n- name: a/b\n  env_name: b\n  package: c", "name must be 1 to 64 letters"),
        ("plugins:\n- name: a\n  env_name: b\n  package: [c]", "line 4: package must be text"),
        ("plugins:\n- name: a\n  env_name: b\n  package: --index-url=x", "package must be a requirement"),
        ("plugins:\n- {name: a, env_name: b, package: c}\n- {name: a, env_name: d, package: c}", "'a' is used twice"),
        ("plugins:\n- {name: a, name: b, env_name: b, package: c}", "'name' is given twice"),
        ("plugins: [", "cannot be read"),
        ("plugins:\n- just text", "line 2: a plugin must be a mapping"),
    ],
)
def test_a_bad_plugins_file_is_refused_with_line_and_reason(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "plugins.yaml"
    file.write_text(text)
    with pytest.raises(PluginConfigError) as caught:
        load_plugins_file(file)
    assert reason in str(caught.value)
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert (done.exit_code, reason in done.stderr) == (1, True)


def test_a_path_is_relative_to_the_plugins_file_and_a_requirement_stays_as_written(tmp_path: Path) -> None:
    file = tmp_path / "plugins.yaml"
    file.write_text(
        "plugins:\n"
        "- {name: a, env_name: a, package: ./plugins/a}\n"
        "- {name: b, env_name: b, package: 'b-plugin>=1,<2', python_version: '3.12'}\n"
        "- {name: c, env_name: c, package: -e ./c}\n"
    )
    local, named, editable = load_plugins_file(file)
    assert local.requirement == str(tmp_path / "plugins" / "a")
    assert (named.requirement, named.python_version, named.folder) == ("b-plugin>=1,<2", "3.12", None)
    assert (editable.folder, editable.editable) == (tmp_path / "c", True)


def test_the_command_says_what_is_wrong_with_its_usage() -> None:
    assert CliRunner().invoke(app, []).exit_code == 2
    assert CliRunner().invoke(app, ["unknown"]).exit_code == 2
    done = subprocess.run(
        [sys.executable, "-c", "from plugin_substrate.cli import main; main()", "validate", "no.txt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "no.txt: neither .json nor .yaml; say what it is with --format\n")


SLOW_BACKEND = """
from hatchling.build import *
from hatchling.build import build_wheel as really

def build_wheel(*arguments, **options):
    with open("{pipe}"):
        return really(*arguments, **options)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_installation_that_was_ended_in_its_middle_is_made_anew_by_the_next(
    workspace: Workspace, number: signal.Signals
) -> None:
    """The uv of a killed installer may go on for a while; the next one waits for it."""
    pipe, package = workspace.folder / "pipe", workspace.package.parent
    os.mkfifo(pipe)
    (package / "slow.py").write_text(SLOW_BACKEND.format(pipe=pipe))
    slow = PYPROJECT.replace('"hatchling.build"', '"slow"\nbackend-path = ["."]')
    (package / "pyproject.toml").write_text(slow)
    command = [sys.executable, "-c", "from plugin_substrate.cli import main; main()", "install-all"]
    command += ["--plugins", str(workspace.plugins), "--data-dir", str(workspace.data_dir)]
    ended = subprocess.Popen(command, start_new_session=True)
    with pipe.open("w"):  # opens once uv builds the plugin: the installation is in its middle
        workspace.mark.touch()
        (package / "pyproject.toml").write_text(PYPROJECT)
        if number == signal.SIGKILL:
            ended.kill()  # alone: uv lives on
        else:
            os.killpg(ended.pid, number)  # as a terminal's Ctrl-C
        assert ended.wait(60) != 0
        again = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said, _ = again.communicate(timeout=120)
    assert (again.returncode, said) == (0, "tiny: installed\n")
    assert not workspace.mark.exists(), "nothing of the half-made environment is used"
    assert workspace.install().output == "tiny: unchanged\n"


def test_what_a_supervisor_imports_is_compiled_for_its_interpreter() -> None:
    compiled = Path(cache_from_source(runtime.__file__))
    compiled.unlink(missing_ok=True)
    compile_our_files(Path(sys.executable))
    assert compiled.is_file()


# -- files that describe an environment

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"


def spec_with(env_file: Path, *more: str) -> PluginSpec:
    lines = ["plugins:", "  - name: tiny", "    env_name: tiny", "    package: tiny", f"    env_file: {env_file.name}"]
    plugins = env_file.parent / "plugins.yaml"
    plugins.write_text("\n".join([*lines, *(f"    {line}" for line in more)]))
    (spec,) = load_plugins_file(plugins)
    return spec


def test_of_a_conda_environment_python_and_what_pip_installs_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "environment.yml"
    file.write_text(
        "name: tiny\nchannels: [conda-forge]\ndependencies:\n  - python=3.12.*\n  - pip\n"
        "  - pip:\n    - attrs>=23  # for its classes\n    - typing-extensions\n"
    )
    spec = spec_with(file)
    assert (spec.python_version, spec.env_requirements) == ("3.12", ("attrs>=23", "typing-extensions"))


def test_a_file_of_requirements_is_taken_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# ours\nattrs==23.1 # pinned\n\ntyping-extensions; python_version < '4'\n")
    assert spec_with(file).env_requirements == ("attrs==23.1", "typing-extensions; python_version < '4'")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("environment.yml", "dependencies: [python=3.12, cudatoolkit=11.8]", "'cudatoolkit=11.8' would need conda"),
        ("environment.yml", "dependencies: [python>=3.11]", "would need conda"),
        ("environment.yml", "dependencies: [{pip: ['-e .']}]", "'-e .' is no requirement"),
        ("environment.yml", "channels: []", "no list of dependencies"),
        ("environment.yml", "{", "cannot be read"),
        ("requirements.txt", "--index-url https://example.org", "is no requirement"),
    ],
)
def test_what_an_environment_file_wants_and_cannot_have_is_named(
    name: str, text: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PluginConfigError, match=re.escape(reason)):
        spec_with(tmp_path / name)


def test_an_environment_file_is_a_path_and_the_only_one_to_speak_of_python(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").touch()
    with pytest.raises(PluginConfigError, match="exclude each other"):
        spec_with(tmp_path / "requirements.txt", "python_version: '3.12'")
    with pytest.raises(PluginConfigError, match="cannot be read"):
        spec_with(tmp_path / "absent.txt")
    (tmp_path / "plugins.yaml").write_text(
        "plugins: [{name: tiny, env_name: tiny, package: tiny, env_file: 'https://example.org/e.yml'}]"
    )
    with pytest.raises(PluginConfigError, match="download"):
        load_plugins_file(tmp_path / "plugins.yaml")


def test_what_an_environment_file_wants_is_installed_and_a_change_of_it_is_seen(workspace: Workspace) -> None:
    file = workspace.folder / "environment.yml"
    file.write_text(f"dependencies: [python={MINOR}, {{pip: [iniconfig]}}]")
    workspace.plugins.write_text(workspace.plugins.read_text() + "    env_file: environment.yml\n")
    assert workspace.install().output == "tiny: installed\n"
    python = workspace.data_dir / "envs/tiny/bin/python"
    subprocess.run([python, "-I", "-c", "import iniconfig, tiny"], check=True)
    assert workspace.install().output == "tiny: unchanged\n"
    file.write_text(f"dependencies: [python={MINOR}, {{pip: ['iniconfig>=1']}}]")
    assert workspace.install().output == "tiny: installed\n"
