from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import plugin_substrate
import pytest
from plugin_substrate import (
    CallContext,
    CallNotStartedError,
    InputFile,
    OutputFile,
    PluginCancelledError,
    PluginConfigError,
    PluginError,
    PluginFatalError,
    PluginInputError,
    PluginLoadError,
    PluginManager,
    PluginMeta,
    PluginNotLoadedError,
    PluginResourceError,
    PluginTimeoutError,
    PluginTransientError,
    ResourceShortfall,
    WireValueError,
    WorkerDiedError,
)
from plugin_substrate.testing.leftovers import seen_from_here
from plugin_substrate.worker.landlock import kernel_abi

MetaFactory = Callable[..., PluginMeta]


def child_processes() -> set[int]:
    """The children of every thread of this process; looked for again when a thread ends meanwhile, as they pass on."""
    while True:
        tasks = Path("/proc/self/task").iterdir()
        with suppress(FileNotFoundError):
            return {int(pid) for task in tasks for pid in (task / "children").read_text(encoding="ascii").split()}


def open_descriptors() -> int:
    gc.collect()  # what an earlier test left may close some at any moment
    return len(list(Path("/proc/self/fd").iterdir()))


# -- load, call, unload


async def test_a_loaded_plugin_answers_and_leaves_nothing_when_unloaded(
    manager: PluginManager, probe_meta: MetaFactory, tmp_path: Path
) -> None:
    processes, descriptors = child_processes(), open_descriptors()
    instance = await manager.load_plugin_async(probe_meta(), {"colour": "red"})
    assert (instance.plugin_name, instance.config, instance.alive) == ("probe", {"colour": "red"}, True)
    assert await manager.execute_plugin_async("probe", action="probe.echo", x=1) == {"x": 1}
    assert await manager.unload_plugin_async("probe")
    assert (tmp_path / "data/data/probe/no-tenant/cleanups").read_text() == "cleaned\n"
    assert not await manager.unload_plugin_async("probe")
    assert child_processes() == processes
    assert open_descriptors() == descriptors


async def test_values_and_files_cross_whole_in_both_directions(probe: PluginManager) -> None:
    sent = {"blob": b"\x00\xff" * 100_000, "pair": (1, Path("a/b")), "file": InputFile("in.csv", "text/csv", b"a,b")}
    assert await probe.execute_plugin_async("probe", action="probe.echo", **sent) == sent


class Table:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def to_temp_file(self) -> str:
        path = self.folder / "table.csv"
        path.write_text("a,b", encoding="utf-8")
        return str(path)


class FullDisk:
    def to_temp_file(self) -> str:
        raise OSError("no space")


async def test_an_argument_that_stands_in_a_file_arrives_as_its_path(probe: PluginManager, tmp_path: Path) -> None:
    seen = await probe.execute_plugin_async("probe", action="probe.echo", table=Table(tmp_path))
    assert seen == {"table": str(tmp_path / "table.csv")}
    with pytest.raises(PluginInputError, match="no space") as caught:
        await probe.execute_plugin_async("probe", action="probe.echo", table=FullDisk())
    assert caught.value.fields_invalid == ("table",)


async def test_progress_of_a_call_is_never_reported_as_the_next_ones(probe: PluginManager) -> None:
    heard: list[tuple[float, str]] = []
    await probe.execute_call("probe", action="probe.report", steps=3)
    await probe.execute_call("probe", action="probe.echo", on_progress=lambda *report: heard.append(report))
    assert heard == []


async def test_sixteen_megabytes_cross(probe: PluginManager) -> None:
    blob = os.urandom(16 << 20)
    assert (await probe.execute_plugin_async("probe", action="probe.echo", blob=blob))["blob"] == blob


async def test_a_plugin_sees_the_context_of_its_call(probe: PluginManager) -> None:
    call = CallContext("c1", "acme", "run", "step", "00-ab-cd-01", None)
    assert await probe.execute_plugin_async("probe", action="probe.context", call=call) == vars(call)


async def test_progress_is_pushed_in_order_and_usage_is_what_was_reported_last(probe: PluginManager) -> None:
    heard: list[tuple[float, str]] = []
    result = await probe.execute_call(
        "probe", action="probe.report", steps=3, on_progress=lambda *report: heard.append(report)
    )
    assert heard == [(0.0, "step 0"), (1 / 3, "step 1"), (2 / 3, "step 2")]
    assert result.usage == {"pages": 2, "bytes": 10.5}
    assert result.value == OutputFile("report.txt", "text/plain", b"done")


async def test_a_listener_that_raises_harms_only_itself(probe: PluginManager) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("my own fault")

    result = await probe.execute_call("probe", action="probe.report", steps=2, on_progress=fails)
    assert result.value.name == "report.txt"


async def test_concurrent_loads_of_one_id_give_one_worker(manager: PluginManager, probe_meta: MetaFactory) -> None:
    processes = child_processes()
    instances = await asyncio.gather(*(manager.load_plugin_async(probe_meta()) for _ in range(4)))
    assert len({instance.pid for instance in instances}) == 1
    assert len(child_processes() - processes) == 1


async def test_instances_of_one_plugin_have_a_worker_each_and_one_supervisor(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    one = await manager.load_plugin_async(probe_meta(), instance_id="one")
    two = await manager.load_plugin_async(probe_meta(), instance_id="two")
    assert one.pid != two.pid
    assert one.supervisor_pid == two.supervisor_pid
    await manager.unload_plugin_async("one")
    assert await manager.execute_plugin_async("two", action="probe.echo") == {}


async def test_one_call_at_a_time_unless_more_were_asked_for(manager: PluginManager, probe_meta: MetaFactory) -> None:
    await manager.load_plugin_async(probe_meta(), instance_id="wide", max_concurrent_requests=2)
    calls = [
        manager.execute_plugin_async("wide", action="probe.meet", call=CallContext(name)) for name in ("left", "right")
    ]
    assert await asyncio.gather(*calls) == ["left", "right"]


async def test_an_unknown_instance_and_a_wrong_id_are_refused(manager: PluginManager, probe_meta: MetaFactory) -> None:
    with pytest.raises(PluginNotLoadedError, match="'nobody'"):
        await manager.execute_plugin_async("nobody")
    with pytest.raises(ValueError, match="instance_id"):
        await manager.load_plugin_async(probe_meta(), instance_id="../escape")


async def test_an_unknown_setting_is_refused_before_a_process_is_started(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    processes = child_processes()
    meta = probe_meta(config_schema={"properties": {"depth": {"default": 3}, "mode": {}}})
    with pytest.raises(PluginConfigError) as caught:
        await manager.load_plugin_async(meta, {"dept": 1})
    assert caught.value.fields_invalid == ("dept",)
    assert child_processes() == processes
    assert (await manager.load_plugin_async(meta, {"mode": "x"})).config == {"depth": 3, "mode": "x"}


def test_a_synchronous_call_is_listened_to_as_an_asynchronous_one(tmp_path: Path, probe_meta: MetaFactory) -> None:
    manager = PluginManager(data_dir=tmp_path)
    manager.load_plugin(probe_meta())
    heard: list[tuple[float, str]] = []
    lines: list[str] = []
    for _ in range(2):  # the first may have to wait for something, the next is sent at once
        report = manager.execute_plugin(
            "probe", action="probe.report", steps=2, on_progress=lambda *report: heard.append(report)
        )
        assert report.data == b"done"
        assert heard[-2:] == [(0.0, "step 0"), (1 / 2, "step 1")]
        manager.execute_plugin("probe", action="probe.print", lines=["one"], on_log=lines.append)
    assert (len(heard), lines.count("one")) == (4, 2)
    manager.unload_all()


def test_a_synchronous_host_needs_no_event_loop(tmp_path: Path, probe_meta: MetaFactory) -> None:
    threads = threading.active_count()
    manager = PluginManager(data_dir=tmp_path)
    assert manager.load_plugin(probe_meta())
    assert manager.execute_plugin("probe", action="probe.echo", x=1) == {"x": 1}
    assert not manager.load_plugin(probe_meta("RaisesOnCreate"), instance_id="other")
    manager.unload_all()
    assert threading.active_count() == threads


def test_an_interrupted_synchronous_call_is_cancelled(tmp_path: Path, probe_meta: MetaFactory) -> None:
    manager = PluginManager(data_dir=tmp_path)
    assert manager.load_plugin(probe_meta())
    main = threading.get_ident()

    def interrupt() -> None:
        while not manager.get_instance("probe").running_calls:
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        manager.execute_plugin("probe", action="probe.polite")
    thread.join()
    assert manager.execute_plugin("probe", action="probe.echo", x=1) == {"x": 1}
    manager.unload_all()


def test_any_thread_may_look_at_an_instance_while_calls_run(tmp_path: Path, probe_meta: MetaFactory) -> None:
    manager = PluginManager(data_dir=tmp_path)
    done = threading.Event()
    failed: list[BaseException] = []

    def look() -> None:
        try:
            while not done.is_set():
                view = manager.get_instance("probe")
                assert view.alive
        except (RuntimeError, AssertionError) as error:
            failed.append(error)

    assert manager.load_plugin(probe_meta())
    threads = [threading.Thread(target=look) for _ in range(3)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            assert manager.execute_plugin("probe", action="probe.echo", x=1) == {"x": 1}
    finally:
        done.set()
        sys.setswitchinterval(usual)
        for thread in threads:
            thread.join()  # before the instance goes: whoever has begun to look would find it dead
        manager.unload_all()
    assert failed == []


async def test_a_synchronous_call_inside_the_event_loop_is_refused_instead_of_blocking_it(probe: PluginManager) -> None:
    with pytest.raises(RuntimeError, match="asynchronous form"):
        probe.execute_plugin("probe", action="probe.echo")


# -- failed loads


@pytest.mark.parametrize(
    ("class_name", "module", "phase", "text", "log"),
    [
        ("Probe", "fails_on_import", "import", "libmissing.so", ""),
        ("Probe", "no_such_module", "import", "no_such_module", ""),
        ("Missing", "probe", "class", "Missing", ""),
        ("NoPlugin", "probe", "class", "not a PluginInterface", ""),
        ("RaisesOnCreate", "probe", "create", "no such device", "about to fail"),
        ("RaisesOnInitialize", "probe", "initialize", "threshold must be positive", "reading settings"),
        ("DiesOnInitialize", "probe", "initialize", "SIGSEGV", "out of luck"),
    ],
)
async def test_a_failed_load_names_plugin_phase_and_last_words_and_leaves_no_process(
    manager: PluginManager, probe_meta: MetaFactory, class_name: str, module: str, phase: str, text: str, log: str
) -> None:
    processes, descriptors = child_processes(), open_descriptors()
    with pytest.raises(PluginLoadError, match=text) as caught:
        await manager.load_plugin_async(probe_meta(class_name, module))
    assert (caught.value.plugin_name, caught.value.phase) == ("probe", phase)
    assert log in "\n".join(caught.value.log_tail)
    assert child_processes() == processes
    assert open_descriptors() == descriptors
    assert manager.list_instances() == []


async def test_the_typed_error_of_initialize_is_the_cause(manager: PluginManager, probe_meta: MetaFactory) -> None:
    with pytest.raises(PluginLoadError) as caught:
        await manager.load_plugin_async(probe_meta("RaisesOnInitialize"))
    assert isinstance(caught.value.__cause__, PluginConfigError)
    assert caught.value.__cause__.fields_invalid == ("threshold",)


@pytest.mark.parametrize(("module", "phase"), [("probe", "initialize"), ("hangs_on_import", "import")])
async def test_a_plugin_that_never_gets_ready_is_given_up(
    tmp_path: Path, probe_meta: MetaFactory, module: str, phase: str
) -> None:
    processes = child_processes()
    async with PluginManager(data_dir=tmp_path, load_timeout=3) as manager:
        with pytest.raises(PluginLoadError, match="not ready after") as caught:
            await manager.load_plugin_async(probe_meta("NeverReady", module))
        assert caught.value.phase == phase
        assert child_processes() == processes


async def test_a_load_is_limited_by_silence_not_by_time(tmp_path: Path, probe_meta: MetaFactory) -> None:
    async with PluginManager(data_dir=tmp_path, load_timeout=1.5) as manager:
        deadline = time.monotonic() + 60
        while True:  # each step has fifteen times as long as it takes, and a busy machine may still be late
            started = time.monotonic()
            try:
                await manager.load_plugin_async(probe_meta("SlowStart"), {"steps": 20})
                break
            except PluginLoadError:
                assert time.monotonic() < deadline
        assert time.monotonic() - started > 1.5, "it would have been too slow"


async def test_saying_the_same_again_is_silence(tmp_path: Path, probe_meta: MetaFactory) -> None:
    processes = child_processes()
    async with PluginManager(data_dir=tmp_path, load_timeout=0.5) as manager:
        with pytest.raises(PluginLoadError, match="without progress"):
            await manager.load_plugin_async(probe_meta("SlowStart"), {"steps": 1, "fall_silent": True})
        assert child_processes() == processes


async def test_an_interpreter_that_does_not_exist_is_a_failed_load(
    manager: PluginManager, probe_meta: MetaFactory, probe_python: Path
) -> None:
    meta = probe_meta()
    object.__setattr__(meta.manifest.install, "python_path", "/nowhere/python")
    with pytest.raises(PluginLoadError, match="/nowhere/python"):
        await manager.load_plugin_async(meta)


# -- errors


@pytest.mark.parametrize(
    ("how", "kind", "attributes"),
    [
        ("input", PluginInputError, {"message": "bad rows", "fields_invalid": ("rows", "unit"), "retriable": True}),
        ("transient", PluginTransientError, {"message": "later", "retry_after_seconds": 7.5}),
        ("resource", PluginResourceError, {"resource_shortfall": ResourceShortfall("ram", 10, 4)}),
        ("config", PluginConfigError, {"message": "wrong setting"}),
        ("bare", PluginInputError, {"message": "KeyError: 'missing'", "original_exc_repr": "KeyError('missing')"}),
        ("os", PluginTransientError, {"message": "ConnectionResetError: peer"}),
        ("strange", PluginFatalError, {"retriable": False}),
        ("exit", PluginFatalError, {"message": "SystemExit: 3"}),
        ("not_retriable", PluginInputError, {"retriable": False}),
    ],
)
async def test_an_error_of_the_plugin_arrives_as_its_class_with_its_fields_and_a_known_outcome(
    probe: PluginManager, how: str, kind: type[PluginError], attributes: dict[str, object]
) -> None:
    with pytest.raises(PluginError) as caught:
        await probe.execute_plugin_async("probe", action="probe.fail", how=how)
    assert type(caught.value) is kind
    assert {name: getattr(caught.value, name) for name in attributes} == attributes
    assert caught.value.outcome_known
    assert await probe.execute_plugin_async("probe", action="probe.echo") == {}


async def test_the_traceback_of_a_bare_exception_is_kept(probe: PluginManager) -> None:
    with pytest.raises(PluginError) as caught:
        await probe.execute_plugin_async("probe", action="probe.fail", how="strange")
    assert "ZeroDivisionError: x" in caught.value.remote_traceback


async def test_an_argument_that_cannot_cross_is_refused_before_anything_is_sent(probe: PluginManager) -> None:
    with pytest.raises(WireValueError) as caught:
        await probe.execute_plugin_async("probe", action="probe.echo", rows=[{1, 2}])
    assert (caught.value.path, caught.value.outcome_known) == ("kwargs.rows[0]", True)
    assert (await probe.execute_plugin_async("probe", action="probe.count"))[0] == 1


async def test_a_result_that_cannot_cross_names_its_place_and_leaves_the_effect_unknown(probe: PluginManager) -> None:
    with pytest.raises(WireValueError) as caught:
        await probe.execute_plugin_async("probe", action="probe.unencodable")
    assert (caught.value.path, caught.value.outcome_known) == ("result.rows[1].weight", False)


# -- what a plugin prints


async def test_prints_become_log_lines_of_their_call_and_cannot_forge_frames(probe: PluginManager) -> None:
    heard: list[str] = []
    result = await probe.execute_call(
        "probe", action="probe.print", lines=["one", '{"type":"result"}', "\x1b[31mred"], on_log=heard.append
    )
    assert list(result.logs) == heard
    assert heard[:3] == ["one", '{"type":"result"}', "\\x1b[31mred"]
    assert "to stderr, without an end" in heard


async def test_what_is_written_below_python_belongs_to_the_only_running_call(probe: PluginManager) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(
        probe.execute_call(
            "probe",
            action="probe.print_below_python",
            text="from C",
            call=CallContext("the call"),
            on_log=heard.put_nowait,
        )
    )
    async with asyncio.timeout(30):
        assert await heard.get() == "from C"
    await probe.cancel_call("probe", "the call")
    await asyncio.wait({task})


@pytest.mark.parametrize("action", ["probe.break_protocol", "probe.forge_answer"])
async def test_a_worker_that_breaks_the_protocol_is_killed_and_replaced(probe: PluginManager, action: str) -> None:
    with pytest.raises(WorkerDiedError, match="broke the protocol") as caught:
        await probe.execute_plugin_async("probe", action=action)
    assert not caught.value.outcome_known
    assert await probe.execute_plugin_async("probe", action="probe.echo") == {}


# -- confinement


async def test_a_worker_has_nothing_of_the_host_but_its_socket_and_its_log(
    manager: PluginManager, probe_meta: MetaFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bubblewrap: bool
) -> None:
    monkeypatch.setenv("API_SECRET", "s3cret")
    with (tmp_path / "open").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        instance = await manager.load_plugin_async(probe_meta())
        await manager.load_plugin_async(probe_meta(), instance_id="sibling")
        seen = await manager.execute_plugin_async("sibling", action="probe.surroundings")
    links = seen["descriptors"]
    assert {name: link.split(":")[0] for name, link in links.items()} == {
        "0": "/dev/null",
        "1": "pipe",
        "2": "pipe",
        "3": "socket",
    }
    assert set(seen["environment"]) == {"PATH", "LANG", "HOME", "TMPDIR", "CJM_PLUGIN_DATA_DIR"}
    assert "s3cret" not in str(seen)
    assert seen["session"] == seen["pid"]
    assert seen["no_new_privs"] == "1"
    assert seen["cwd"] == seen["environment"]["CJM_PLUGIN_DATA_DIR"] == str(tmp_path / "data/data/probe/no-tenant")
    allowed = tuple(f"plugin_substrate.{name}" for name in ("interface", "errors", "records", "worker"))
    assert [name for name in seen["modules"] if not name.startswith(allowed)] == ["plugin_substrate"]
    assert instance.layers == (
        *(("bubblewrap",) if bubblewrap else ()),
        "capabilities_dropped",
        "clean_environment",
        "closed_descriptors",
        "disk_sampled",
        f"landlock:{kernel_abi()}",
        "memory_sampled",
        "new_session",
        "no_new_privs",
        "not_dumpable",
        "parent_death_signal",
        "rlimits",
        "seccomp",
        "umask",
    )


async def test_a_plugin_may_import_from_the_package_itself_what_belongs_to_plugins(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta("FromTheTop", "from_the_top", "from-the-top"))
    modules = [f"plugin_substrate.{name}" for name in ("interface", "errors")]
    names = [
        name
        for name in plugin_substrate.__all__
        if getattr(getattr(plugin_substrate, name), "__module__", "") in modules
    ]
    assert {"PluginInterface", "PluginInputError", "plugin_action"} < set(names)
    call = manager.execute_plugin_async("from-the-top", [*names, "PluginManager", "os"])
    assert await call == (["PluginManager", "os"], "plugin_substrate.interface")


async def test_neither_supervisor_nor_worker_was_started_with_a_secret(
    manager: PluginManager, probe_meta: MetaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_SECRET", "s3cret")
    instance = await manager.load_plugin_async(probe_meta(), {"token": "s3cret"})
    started_with = [Path(f"/proc/{instance.supervisor_pid}/{file}") for file in ("environ", "cmdline")]
    assert not any(b"s3cret" in path.read_bytes() for path in started_with)


# -- cancel


async def started_call(manager: PluginManager, action: str, **options: object) -> asyncio.Task[object]:
    """Start a call and return when the plugin is in it."""
    running = asyncio.Event()
    task = asyncio.create_task(
        manager.execute_plugin_async(
            "probe",
            action=action,
            call=CallContext("the call", **options),  # type: ignore[arg-type]
            on_progress=lambda *_: running.set(),
        )
    )
    await asyncio.wait({task, asyncio.ensure_future(running.wait())}, return_when=asyncio.FIRST_COMPLETED)
    return task


async def test_a_plugin_that_checks_ends_by_itself_and_keeps_its_worker(probe: PluginManager) -> None:
    pid = probe.get_instance("probe").pid
    task = await started_call(probe, "probe.polite")
    assert await probe.cancel_call("probe", "the call") == "cooperative"
    with pytest.raises(PluginCancelledError) as caught:
        await task
    assert (caught.value.forced, caught.value.outcome_known) == (False, True)
    assert probe.get_instance("probe").pid == pid


async def test_a_cancel_callback_wakes_a_waiting_plugin_and_its_result_still_counts(probe: PluginManager) -> None:
    task = await started_call(probe, "probe.waits_for_callback")
    assert await probe.cancel_call("probe", "the call") == "cooperative"
    assert await task == "finished all the same"


@pytest.mark.parametrize("action", ["probe.stubborn", "probe.busy"])
async def test_a_plugin_that_does_not_listen_is_killed_after_the_grace(probe: PluginManager, action: str) -> None:
    task = await started_call(probe, action)
    assert await probe.cancel_call("probe", "the call") == "forced"
    with pytest.raises(PluginCancelledError) as caught:
        await task
    assert (caught.value.forced, caught.value.outcome_known) == (True, False)
    assert await probe.execute_plugin_async("probe", action="probe.echo") == {}


async def test_cancelling_one_call_leaves_the_other_in_the_same_worker_alone(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta(), max_concurrent_requests=2)
    other_runs = asyncio.Event()
    other = asyncio.create_task(
        manager.execute_plugin_async(
            "probe", action="probe.polite", call=CallContext("other"), on_progress=lambda *_: other_runs.set()
        )
    )
    await other_runs.wait()
    task = await started_call(manager, "probe.polite")
    await manager.cancel_call("probe", "the call")
    with pytest.raises(PluginCancelledError):
        await task
    assert not other.done()
    await manager.cancel_call("probe", "other")
    with pytest.raises(PluginCancelledError):
        await other


async def test_cancelling_what_is_not_running_says_so(probe: PluginManager) -> None:
    assert await probe.cancel_call("probe", "unknown") == "not_running"


async def test_cancelling_the_awaiting_task_cancels_the_call_and_frees_the_slot(probe: PluginManager) -> None:
    task = await started_call(probe, "probe.polite")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await probe.execute_plugin_async("probe", action="probe.echo") == {}


async def test_a_deadline_ends_a_call_and_one_in_the_past_is_never_sent(probe: PluginManager) -> None:
    with pytest.raises(PluginTimeoutError) as late:
        await (await started_call(probe, "probe.polite", deadline=time.time() + 0.2))
    assert late.value.outcome_known
    with pytest.raises(PluginTimeoutError, match="not sent"):
        await probe.execute_plugin_async("probe", action="probe.count", call=CallContext("x", deadline=1.0))


# -- death and revival


async def test_a_worker_killed_under_a_call_is_a_typed_error_and_the_next_call_finds_a_new_one(
    probe: PluginManager,
) -> None:
    first = probe.get_instance("probe").pid
    task = await started_call(probe, "probe.stubborn")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(WorkerDiedError) as caught:
        await task
    assert (caught.value.signal_name, caught.value.returncode, caught.value.outcome_known) == ("SIGKILL", -9, False)
    calls, pid = await probe.execute_plugin_async("probe", action="probe.count")
    assert calls == 1, "the interrupted call was not repeated"
    assert pid != first


async def test_a_worker_that_died_idle_is_replaced_before_the_next_call_is_sent(probe: PluginManager) -> None:
    for _ in range(20):
        pid = probe.get_instance("probe").pid
        assert pid is not None
        descriptor = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([descriptor], [], [], 10)[0]  # dead, but the event loop has not heard of it
        os.close(descriptor)
        assert await probe.execute_plugin_async("probe", action="probe.echo") == {}


async def test_the_last_words_and_the_manner_of_a_death_are_reported(probe: PluginManager) -> None:
    with pytest.raises(WorkerDiedError, match="SIGABRT") as by_signal:
        await probe.execute_plugin_async("probe", action="probe.die", number=int(signal.SIGABRT))
    assert by_signal.value.log_tail[-1] == "last words"
    with pytest.raises(WorkerDiedError, match="status 3") as by_exit:
        await probe.execute_plugin_async("probe", action="probe.leave", status=3)
    assert (by_exit.value.returncode, by_exit.value.signal_name) == (3, "")


async def test_a_killed_supervisor_takes_its_workers_along_and_the_next_call_finds_a_new_tree(
    probe: PluginManager,
) -> None:
    before = probe.get_instance("probe")
    assert before.supervisor_pid is not None
    task = await started_call(probe, "probe.stubborn")
    os.kill(before.supervisor_pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        await task
    assert await probe.execute_plugin_async("probe", action="probe.echo") == {}
    assert probe.get_instance("probe").supervisor_pid != before.supervisor_pid


async def test_what_a_dead_worker_leaves_behind_is_killed(manager: PluginManager, probe_meta: MetaFactory) -> None:
    await manager.load_plugin_async(probe_meta(granted={"processes": 8}))
    probe = manager
    inner = await probe.execute_plugin_async("probe", action="probe.daemon")
    orphan = seen_from_here(inner, os.getpid())
    gone = asyncio.Event()
    descriptor = os.pidfd_open(orphan)
    asyncio.get_running_loop().add_reader(descriptor, gone.set)
    with pytest.raises(WorkerDiedError):
        await probe.execute_plugin_async("probe", action="probe.leave", status=0)
    async with asyncio.timeout(30):
        await gone.wait()
    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)


# -- the last check before sending


async def test_before_start_is_asked_when_all_is_ready_and_its_no_sends_nothing(probe: PluginManager) -> None:
    async def no() -> bool:
        assert probe.get_instance("probe").running_calls == 0
        return False

    async def fails() -> bool:
        raise ConnectionError("no answer")

    with pytest.raises(CallNotStartedError) as refused:
        await probe.execute_call("probe", action="probe.count", before_start=no)
    assert refused.value.__cause__ is None
    with pytest.raises(CallNotStartedError, match="no answer"):
        await probe.execute_call("probe", action="probe.count", before_start=fails)
    assert (await probe.execute_plugin_async("probe", action="probe.count"))[0] == 1


async def test_a_value_that_cannot_cross_is_found_before_permission_is_spent(probe: PluginManager) -> None:
    asked: list[bool] = []

    async def yes() -> bool:
        asked.append(True)
        return True

    with pytest.raises(WireValueError):
        await probe.execute_call("probe", action="probe.echo", x=object(), before_start=yes)
    assert asked == []


async def test_two_running_calls_cannot_share_an_id(manager: PluginManager, probe_meta: MetaFactory) -> None:
    await manager.load_plugin_async(probe_meta(), max_concurrent_requests=2)
    task = await started_call(manager, "probe.polite")
    with pytest.raises(PluginInputError, match="already running"):
        await manager.execute_plugin_async("probe", action="probe.echo", call=CallContext("the call"))
    await manager.cancel_call("probe", "the call")
    await asyncio.wait({task})
    assert isinstance(task.exception(), PluginCancelledError)


async def test_unloading_under_a_call_ends_it_as_a_death_with_unknown_outcome(probe: PluginManager) -> None:
    task = await started_call(probe, "probe.stubborn")
    await probe.unload_plugin_async("probe")
    with pytest.raises(WorkerDiedError) as caught:
        await task
    assert not caught.value.outcome_known
