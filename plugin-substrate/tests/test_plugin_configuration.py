"""The settings of a host: read strictly, and in a documented order."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_substrate import PluginConfigError
from plugin_substrate.configuration import (
    CJMConfig,
    CondaType,
    RuntimeMode,
    get_config,
    load_config,
    reset_config,
    set_config,
)

FULL = """\
runtime:
  mode: local
  conda_type: micromamba
  prefix: runtime
  binaries:
    linux-x64: bin/micromamba
data_dir: /srv/cjm
plugins_config: my-plugins.yaml
models_dir: ../models
substrate:
  drift_detection: false
  empirical_tracking: true
  prefetch_stall_threshold_seconds: 2.5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    return tmp_path / "conf" / "cjm.yaml"


def test_every_key_is_read_and_paths_are_relative_to_the_file(file: Path, tmp_path: Path) -> None:
    file.write_text(FULL)
    config = load_config(file, environ={})
    assert (config.runtime.mode, config.runtime.conda_type) == (RuntimeMode.LOCAL, CondaType.MICROMAMBA)
    assert config.runtime.prefix == file.parent / "runtime"
    assert config.runtime.binaries == {"linux-x64": file.parent / "bin" / "micromamba"}
    assert config.plugins_config == file.parent / "my-plugins.yaml"
    assert config.models_dir == tmp_path / "models"
    substrate = config.substrate
    assert (substrate.drift_detection, substrate.empirical_tracking) == (False, True)
    assert substrate.prefetch_stall_threshold_seconds == 2.5
    assert config.manifests_dir == Path("/srv/cjm/manifests")
    assert config.plugin_data_dir == Path("/srv/cjm/data")
    assert config.logs_dir == Path("/srv/cjm/logs")


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_without_a_file_or_with_an_empty_one_the_defaults_count(
    content: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert load_config(environ={}) == CJMConfig()
    assert CJMConfig().data_dir == Path.home() / ".cjm"
    file.write_text(content)
    assert load_config(environ={}) == CJMConfig()


def test_the_command_line_counts_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(FULL)
    monkeypatch.chdir(file.parent)
    assert load_config(environ={}).data_dir == Path("/srv/cjm")
    environ = {"CJM_DATA_DIR": "/env", "CJM_CONDA_PREFIX": "/env/conda", "CJM_CONDA_TYPE": "miniforge"}
    config = load_config(environ=environ)
    assert (config.data_dir, config.runtime.prefix) == (Path("/env"), Path("/env/conda"))
    assert config.runtime.conda_type is CondaType.MINIFORGE
    config = load_config(data_dir=Path("/cli"), conda_type="conda", environ=environ)
    assert (config.data_dir, config.runtime.conda_type) == (Path("/cli"), CondaType.CONDA)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('substrate:\n  drift_detection: "false"\n', "line 2: substrate.drift_detection must be true or false"),
        ("substrate:\n  drift_detection: 0\n", "must be true or false, not '0'"),
        ("substrate:\n  prefetch_stall_threshold_seconds: -1\n", "above 0"),
        ("substrate:\n  prefetch_stall_threshold_seconds: .nan\n", "above 0"),
        ("substrate:\n  prefetch_stall_threshold_seconds: '60'\n", "above 0"),
        ("runtime:\n  mode: remote\n", "line 2: runtime.mode must be one of local, system, not 'remote'"),
        ("runtime:\n  conda_type: [conda]\n", "runtime.conda_type must be one of"),
        ("runtime: yes\n", "runtime must be a mapping"),
        ("runtime:\n  binaries:\n    linux-x64: 3\n", "runtime.binaries.linux-x64 must be a path"),
        ("data_dir: ~/cjm\n", "~ is not expanded"),
        ("data_dir:\n", "data_dir must be a path"),
        ("datadir: /x\n", "line 1: unknown key 'datadir'; known: runtime, data_dir"),
        ("substrate:\n  driftdetection: true\n", "line 2: unknown key 'substrate.driftdetection'"),
        ("data_dir: /a\ndata_dir: /b\n", "line 2: data_dir is given twice"),
        ("- a\n", "the top level must be a mapping"),
        ("a: [\n", "cannot be read"),
        ("a: !!python/object:os.system x\n", "unknown key 'a'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(content: str, reason: str, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(PluginConfigError) as caught:
        load_config(file, environ={})
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)


def test_all_that_is_wrong_is_named_at_once(file: Path) -> None:
    file.write_text("datadir: /x\nsubstrate:\n  drift_detection: maybe\n")
    with pytest.raises(PluginConfigError) as caught:
        load_config(file, environ={})
    assert len(str(caught.value).splitlines()) == 2


def test_a_path_that_is_given_and_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PluginConfigError, match="does not exist"):
        load_config(tmp_path / "no.yaml", environ={})


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(PluginConfigError, match="CJM_CONDA_TYPE must be one of"):
        load_config(environ={"CJM_CONDA_TYPE": "pip"})


def test_the_default_settings_are_read_once_and_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    reset_config()
    monkeypatch.setenv("CJM_DATA_DIR", "/one")
    assert get_config().data_dir == Path("/one")
    monkeypatch.setenv("CJM_DATA_DIR", "/two")
    assert get_config().data_dir == Path("/one")
    set_config(CJMConfig(data_dir=Path("/three")))
    assert get_config().data_dir == Path("/three")
    reset_config()
    assert get_config().data_dir == Path("/two")
    reset_config()
