from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from plugin_substrate import IsolationTerms
from plugin_substrate.errors import (
    ManifestError,
    PluginCancelledError,
    PluginConfigError,
    PluginInputError,
    PluginLoadError,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.interface import CallContext, PluginInterface
from plugin_substrate.testing import (
    ConfinementProbe,
    LeftBehindError,
    PluginWorkers,
    attempt,
    attempt_async,
    load_in_process,
    plugin_meta,
    run_in_process,
    stream_in_process,
)
from plugin_substrate.testing.leftovers import descendants

pytest_plugins = ["pytester"]

PLUGINS = Path(__file__).parent / "plugins"
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def sample_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kit_sample", PLUGINS / "kit_sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kit_sample"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sample(sample_module: ModuleType) -> type[PluginInterface]:
    cls: type[PluginInterface] = sample_module.Sample
    return cls


# -- in the test's own process


def test_progress_is_part_of_the_result(sample: type[PluginInterface]) -> None:
    result = run_in_process(sample(), action="sample.count", upto=2)
    assert (result.value, result.progress) == (2, ((0.0, "step 0"), (0.5, "step 1")))


def test_a_call_is_cancelled_at_the_report_that_the_test_chooses(sample: type[PluginInterface]) -> None:
    plugin, heard = sample(), []
    with pytest.raises(PluginCancelledError):
        run_in_process(
            plugin,
            action="sample.count",
            upto=4,
            call=CallContext("mine"),
            on_progress=lambda progress, _: heard.append(progress),
            cancel_when=lambda progress, _: progress >= 0.5,
        )
    assert heard == [0.0, 0.25, 0.5]
    assert vars(plugin)["heard_cancel"] == "mine"


def test_what_a_plugin_prints_and_logs_are_its_log_lines(
    sample: type[PluginInterface], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_in_process(sample(), action="sample.talk")
    assert result.logs == ("printed", "[INFO] sample: logged", "unfinished")
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger().level == logging.WARNING


def test_the_log_lines_of_a_failed_call_are_heard(sample: type[PluginInterface]) -> None:
    heard: list[str] = []
    with pytest.raises(PluginInputError, match="no more words"):
        run_in_process(sample(), action="sample.talk", fail=True, on_log=heard.append)
    assert heard == ["printed", "[INFO] sample: logged", "unfinished"]


def test_a_stream_gives_its_chunks_and_is_closed_when_the_test_has_enough(sample: type[PluginInterface]) -> None:
    result = stream_in_process(sample(), 3)
    assert [chunk["step"] for chunk in result.value] == [0, 1, 2]
    assert len(result.progress) == 3
    part = stream_in_process(sample(), 1000, take=2)
    assert len(part.value) == 2
    assert part.logs == ("closed",)


def test_a_stream_is_cancelled_and_fails_as_a_host_sees_it(sample: type[PluginInterface]) -> None:
    heard: list[object] = []
    with pytest.raises(PluginCancelledError):
        stream_in_process(sample(), 4, on_chunk=heard.append, cancel_when=lambda progress, _: progress >= 0.5)
    assert len(heard) == 2
    heard.clear()
    with pytest.raises(WireValueError) as caught:
        stream_in_process(sample(), 4, broken=True, on_chunk=heard.append)
    assert (caught.value.path, len(heard)) == ("chunk[2].weight", 2)


def test_a_plugin_is_loaded_with_a_configuration_that_was_checked(sample: type[PluginInterface]) -> None:
    assert load_in_process(sample).get_current_config() == {"unit": "kg"}
    assert load_in_process(sample, {"unit": "t"}).get_current_config() == {"unit": "t"}
    with pytest.raises(PluginConfigError, match="unit: ") as caught:
        load_in_process(sample, {"unit": "", "unity": 1})
    assert set(caught.value.fields_invalid) == {"unit", "unity"}
    with pytest.raises(PluginLoadError, match="nobody weighs in stones") as failed:
        load_in_process(sample, {"unit": "stone"})
    assert failed.value.phase == "initialize"


# -- in a worker


def test_a_class_runs_in_a_worker_with_the_libraries_of_the_test(
    plugin_workers: PluginWorkers, sample: type[PluginInterface]
) -> None:
    worker = plugin_workers.start(sample)
    assert worker.call(action="sample.library").value == "a: 1\n"
    assert worker.call(action="sample.pid").value == worker.instance.pid != os.getpid()
    assert worker.call(action="sample.talk").logs == ("printed", "[INFO] sample: logged", "unfinished")
    assert "no_new_privs" in worker.instance.layers
    assert plugin_workers.describe(sample).capabilities == tuple(
        f"sample.{action}" for action in ("child", "count", "interpreter", "library", "pid", "talk")
    )
    killed = worker.instance.pid
    worker.kill()
    assert not worker.instance.alive
    assert worker.call(action="sample.pid").value != killed
    worker.unload()
    assert not plugin_workers.manager.list_instances()


def test_a_worker_streams_to_its_end_or_until_the_test_has_enough(
    plugin_workers: PluginWorkers, sample: type[PluginInterface]
) -> None:
    worker = plugin_workers.start(sample)
    assert [chunk["step"] for chunk in worker.stream(3)] == [0, 1, 2]
    assert len(worker.stream(10**6, take=2)) == 2
    assert worker.stream(3, take=0) == []
    assert worker.call(action="sample.count", upto=1).value == 1


def test_a_python_that_a_plugin_starts_finds_the_plugins_libraries(
    plugin_workers: PluginWorkers, sample: type[PluginInterface]
) -> None:
    worker = plugin_workers.start(sample, isolation={"processes": 1})
    assert worker.call(action="sample.interpreter").value == "- 1\n\n"


def test_a_class_that_must_not_be_imported_here_is_loaded_by_name(plugin_workers: PluginWorkers) -> None:
    worker = plugin_workers.start("hostile:Hostile", place=PLUGINS, name="hostile")
    assert worker.call(action="hostile.pid").value == worker.instance.pid
    assert "hostile" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="place="):
        plugin_workers.describe("no_such_module:Plugin")
    with pytest.raises(PluginLoadError) as caught:
        plugin_workers.start("fails_on_import:Plugin", place=PLUGINS)
    assert caught.value.phase == "import"


async def test_workers_run_on_the_tests_event_loop_too(tmp_path: Path, sample: type[PluginInterface]) -> None:
    async with PluginWorkers(tmp_path) as workers:
        worker = await workers.start_async(sample)
        assert (await worker.call_async(action="sample.count", upto=1)).value == 1
        with pytest.raises(RuntimeError, match="ends in _async"):
            worker.call(action="sample.count", upto=1)
        (pid,) = (process.pid for process in workers.processes() if process.pid == worker.instance.pid)
    assert not _runs(pid)


def test_what_a_plugin_says_about_itself_is_taken_as_an_installer_takes_it(
    plugin_workers: PluginWorkers, sample_module: ModuleType
) -> None:
    metadata = sample_module.get_plugin_metadata()
    meta = plugin_workers.describe(metadata, place=PLUGINS)
    assert (meta.name, meta.stateless, meta.capabilities) == ("sample", True, ())
    assert meta.manifest.asked_isolation == meta.manifest.granted_isolation == IsolationTerms(processes=2)
    worker = plugin_workers.start(metadata, {"unit": "t"}, place=PLUGINS)
    assert worker.instance.config == {"unit": "t"}
    with pytest.raises(PluginConfigError, match="unity"):
        plugin_workers.start(metadata, {"unity": 1}, place=PLUGINS, instance_id="second")
    with pytest.raises(ManifestError, match=r"unknown key 'code\.typo'"):
        plugin_workers.describe(metadata, place=PLUGINS, typo=1)


@pytest.mark.parametrize("kind", ["package", "namespace package", "module"])
def test_a_plugin_is_found_where_python_finds_it(
    plugin_environments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = f"found_as_{kind.replace(' ', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "plugin.py").touch()
    if kind == "package":
        (tmp_path / name / "__init__.py").touch()
    elif kind == "module":
        (tmp_path / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    module = name if kind == "module" else f"{name}.plugin"
    meta = plugin_meta(f"{module}:Plugin", environments=plugin_environments)
    assert meta.manifest.install.source_paths[0] == str(tmp_path)


def test_isolation_is_asked_for_and_granted_at_once(plugin_environments: Path, sample: type[PluginInterface]) -> None:
    meta = plugin_meta(sample, environments=plugin_environments, name="freer", isolation={"processes": 3})
    assert meta.manifest.asked_isolation == meta.manifest.granted_isolation == IsolationTerms(processes=3)
    assert meta.config_schema["properties"]["unit"]["default"] == "kg"


def test_a_process_that_outlives_the_workers_is_named_and_killed(
    tmp_path: Path, sample: type[PluginInterface], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a process of the test plays one that got away: where there are namespaces none can."""
    monkeypatch.setattr("plugin_substrate.testing.workers._GONE_SECONDS", 1.0)
    workers = PluginWorkers(tmp_path)
    workers.start(sample)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as survivor:
        known = workers.processes() | {mark for mark in descendants(os.getpid()) if mark.pid == survivor.pid}
        workers.processes = lambda: known  # type: ignore[method-assign]
        with pytest.raises(LeftBehindError, match=r"time\.sleep\(1000\)") as caught, workers:
            pass
        assert len(caught.value.processes) == 1
        assert survivor.wait(30) == -signal.SIGKILL


def _runs(pid: int) -> bool:
    return any(process.pid == pid and process.alive for process in descendants(1))


def test_processes_are_told_apart_by_their_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (mark,) = (process for process in descendants(os.getpid()) if process.pid == child.pid)
        assert mark.alive
        assert "input()" in str(mark)
        other = type(mark)(mark.pid, mark.started + 1)
        assert not other.alive
        other.kill()
        assert child.poll() is None
        mark.kill()
        assert child.wait() == -signal.SIGKILL
        assert not mark.alive
    finally:
        child.kill()
        child.communicate()


# -- what confinement gives


def test_the_probe_reports_what_it_could_do_and_what_it_could_not(
    plugin_workers: PluginWorkers, tmp_path: Path
) -> None:
    probe = plugin_workers.start(ConfinementProbe)
    own = plugin_workers.data_dir / "data"
    done = {
        "read": attempt(probe, "read", path=sys.executable),
        "threads": attempt(probe, "threads", count=50),
        "memory": attempt(probe, "memory", size=64 << 20),
        "open_files": attempt(probe, "open_files", count=100),
        "file_size": attempt(probe, "file_size", size=1 << 20),
    }
    assert {name: outcome.done for name, outcome in done.items()} == dict.fromkeys(done, True), done
    assert attempt(probe, "read", path=str(own / "none")).error in {"ENOENT", "EACCES"}
    assert attempt(probe, "file_size", size=1 << 40).error == "EFBIG"
    assert attempt(probe, "open_files", count=100_000).error == "EMFILE"


async def test_an_attempt_that_costs_the_worker_its_life_is_an_outcome(tmp_path: Path) -> None:
    async with PluginWorkers(tmp_path) as workers:
        probe = await workers.start_async(ConfinementProbe)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "call_async", _dies)
            outcome = await attempt_async(probe, "fork")
    assert (outcome.done, outcome.error) == (False, "SIGSYS")


async def _dies(**_: object) -> object:
    raise WorkerDiedError("the worker was ended by SIGSYS", signal_name="SIGSYS")


def test_every_action_of_the_probe_is_harmless_and_answers(plugin_workers: PluginWorkers, tmp_path: Path) -> None:
    """In-process, where nothing holds it, every attempt succeeds and leaves nothing behind."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempts = {
            "read": {"path": __file__},
            "list": {"path": str(tmp_path)},
            "write": {"path": str(tmp_path / "new")},
            "connect": {"host": "127.0.0.1", "port": server.getsockname()[1]},
            "socket": {"family": "AF_INET"},
            "fork": {},
            "spawn": {"command": [sys.executable, "-c", "print('hello')"]},
            "signal": {"pid": os.getpid()},
            "threads": {"count": 3},
            "memory": {"size": 1 << 20},
            "file_size": {"size": 1 << 20},
            "open_files": {"count": 3},
        }
        before = set(tmp_path.iterdir())
        for action, arguments in attempts.items():
            answer = run_in_process(ConfinementProbe(), action=f"probe.{action}", data_dir=tmp_path, **arguments).value
            assert answer["done"], (action, answer)
    assert set(tmp_path.iterdir()) == before
    answer = run_in_process(ConfinementProbe(), action="probe.list", path=str(tmp_path / "none")).value
    assert (answer["done"], answer["error"]) == (False, "ENOENT")


# -- as a pytest plugin


def test_the_tests_in_the_readme_pass_with_the_plugin_in_the_readme(pytester: pytest.Pytester) -> None:
    """The plugin's package lies beside its tests, as in a project of its own."""
    blocks = README.read_text(encoding="utf-8").split("```python\n")[1:]
    plugin, meta, *tests = [block.split("```")[0] for block in blocks if "await" not in block.split("```")[0]][:4]
    package = pytester.mkpydir("word_count")
    (package / "plugin.py").write_text(plugin, encoding="utf-8")
    (package / "meta.py").write_text(meta, encoding="utf-8")
    pytester.makepyfile(test_readme="\n\n".join(tests))
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=3)
