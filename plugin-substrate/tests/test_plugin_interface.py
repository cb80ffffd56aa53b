from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    CallContext,
    OutputFile,
    PluginInputError,
    PluginInterface,
    WireValueError,
    collect_plugin_actions,
    plugin_action,
)
from plugin_substrate.interface import ActiveCall
from plugin_substrate.testing import run_in_process


class Reader(PluginInterface):
    name = "reader"
    version = "1"

    def initialize(self, config: dict[str, Any]) -> None:
        self.config = config

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self.run_action(kwargs.pop("action"), **kwargs)

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return self.config

    @plugin_action("bom.read")
    def read(self, rows: list[Any]) -> Any:
        self.report_progress(0.5, "half")
        self.report_usage({"rows": len(rows)})
        return {"rows": tuple(rows), "step": self.call.step_key, "file": OutputFile("a.txt", "text/plain", b"x")}

    @plugin_action("bom.fail")
    def fail(self) -> None:
        raise ValueError("row 3")

    @plugin_action("bom.odd")
    def odd(self) -> Any:
        return {"value": {1}}

    @plugin_action("bom.folder")
    def folder(self) -> Path:
        return self.data_dir


class StricterReader(Reader):
    def read(self, rows: list[Any]) -> Any:
        return "stricter"


def test_the_test_kit_calls_through_the_real_encoding() -> None:
    heard: list[tuple[float, str]] = []
    result = run_in_process(
        Reader(),
        action="bom.read",
        rows=[1, b"x"],
        call=CallContext("c", step_key="k"),
        on_progress=lambda *report: heard.append(report),
    )
    assert result.value == {"rows": (1, b"x"), "step": "k", "file": OutputFile("a.txt", "text/plain", b"x")}
    assert (result.usage, heard) == ({"rows": 2}, [(0.5, "half")])


def test_the_test_kit_raises_what_a_host_would_raise(tmp_path: Path) -> None:
    with pytest.raises(PluginInputError, match="ValueError: row 3"):
        run_in_process(Reader(), action="bom.fail")
    with pytest.raises(PluginInputError, match=r"no action 'bom\.unknown'"):
        run_in_process(Reader(), action="bom.unknown")
    with pytest.raises(WireValueError, match=r"result\.value"):
        run_in_process(Reader(), action="bom.odd")
    with pytest.raises(WireValueError, match=r"kwargs\.rows"):
        run_in_process(Reader(), action="bom.read", rows={1})
    assert run_in_process(Reader(), action="bom.folder", data_dir=tmp_path).value == tmp_path


def test_tagged_actions_are_found_through_the_bases_and_overriding_needs_no_second_tag() -> None:
    assert collect_plugin_actions(StricterReader) == {"bom.read", "bom.fail", "bom.odd", "bom.folder"}
    assert run_in_process(StricterReader(), action="bom.read", rows=[]).value == "stricter"


def test_two_methods_with_one_tag_are_refused() -> None:
    class Confused(Reader):
        @plugin_action("bom.read")
        def read_too(self) -> None:
            """Another one."""

    with pytest.raises(ValueError, match=r"both tagged 'bom\.read'"):
        collect_plugin_actions(Confused)


@pytest.mark.parametrize("use", ["call", "progress", "usage", "check", "register"])
def test_what_belongs_to_a_call_says_clearly_that_there_is_none(use: str) -> None:
    plugin = Reader()
    uses = {
        "call": lambda: plugin.call,
        "progress": lambda: plugin.report_progress(0.1),
        "usage": lambda: plugin.report_usage({}),
        "check": plugin.check_cancel,
        "register": lambda: plugin.register_cancel_callback(print),
    }
    with pytest.raises(LookupError, match="no call is running in this thread"):
        uses[use]()


def test_without_a_host_there_is_no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CJM_PLUGIN_DATA_DIR", raising=False)
    with pytest.raises(LookupError, match="CJM_PLUGIN_DATA_DIR"):
        _ = Reader().data_dir


def active() -> ActiveCall:
    return ActiveCall(CallContext("c"), on_progress=lambda *_: None, on_usage=lambda _: None)


@pytest.mark.parametrize("progress", [-0.5, 1.1, math.nan, math.inf])
def test_progress_outside_its_range_is_refused(progress: float) -> None:
    with active().entered(), pytest.raises(ValueError, match="progress must be"):
        Reader().report_progress(progress)


@pytest.mark.parametrize("usage", [{"x": -1}, {"x": math.nan}, {"x": True}, {"x": "1"}, {1: 1}])
def test_usage_that_is_no_amount_is_refused(usage: Any) -> None:
    with active().entered(), pytest.raises(ValueError, match="usage maps units"):
        Reader().report_usage(usage)


def test_cancel_fires_every_callback_once_even_when_one_raises_and_late_ones_at_once() -> None:
    call, fired = active(), []

    def fails() -> None:
        raise RuntimeError("mine")

    call.add_callback(lambda: fired.append("first"))
    call.add_callback(fails)
    call.add_callback(lambda: fired.append("last"))
    call.request_cancel()
    call.request_cancel()
    call.add_callback(lambda: fired.append("late"))
    assert fired == ["first", "last", "late"]


def test_a_call_belongs_to_its_thread() -> None:
    seen: list[str] = []

    def other() -> None:
        with pytest.raises(LookupError):
            _ = Reader().call
        seen.append("nothing")

    with active().entered():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == ["nothing"]
