"""For the tests of plugin authors: call a plugin in-process, through the same encoding that a worker uses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plugin_substrate.errors import as_plugin_error
from plugin_substrate.interface import DATA_DIR_VARIABLE, ActiveCall, CallContext, PluginInterface
from plugin_substrate.metadata import CallResult
from plugin_substrate.worker.failures import describe_error, restore_error
from plugin_substrate.worker.frames import FrameDecoder, encode_frame
from plugin_substrate.worker.values import pack_value, unpack_value

__all__ = ["run_in_process"]


def run_in_process(
    plugin: PluginInterface,
    *args: Any,
    call: CallContext | None = None,
    data_dir: Path | None = None,
    on_progress: Callable[[float, str], object] | None = None,
    **kwargs: Any,
) -> CallResult:
    """Call ``plugin.execute`` as a host would: arguments, result and errors go through real frames, both ways.

    What a host would raise is raised: a bare ValueError of the plugin arrives as `PluginInputError`, a value without an
    encoding as `WireValueError`. With ``data_dir`` the plugin sees it as its own folder during the call.
    """
    arguments = _through_a_frame({"args": list(args), "kwargs": kwargs}, "")
    usage: dict[str, float] = {}

    def replace_usage(reported: dict[str, float]) -> None:
        usage.clear()
        usage.update(reported)

    active = ActiveCall(
        call or CallContext(call_id="in-process"),
        on_progress=lambda progress, message: on_progress(progress, message) if on_progress else None,
        on_usage=replace_usage,
    )
    started = time.monotonic()
    try:
        with _data_dir(data_dir), active.entered():
            value = plugin.execute(*arguments["args"], **arguments["kwargs"])
        value = _through_a_frame(value, "result")
    except Exception as error:
        raise restore_error(describe_error(as_plugin_error(error))) from error
    return CallResult(value=value, usage=usage, duration_seconds=time.monotonic() - started)


def _through_a_frame(value: Any, path: str) -> Any:
    (frame,) = FrameDecoder().feed(b"".join(encode_frame({}, pack_value(value, path))))
    return unpack_value(frame.segments)


@contextmanager
def _data_dir(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    before = os.environ.get(DATA_DIR_VARIABLE)
    os.environ[DATA_DIR_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[DATA_DIR_VARIABLE]
        else:
            os.environ[DATA_DIR_VARIABLE] = before
