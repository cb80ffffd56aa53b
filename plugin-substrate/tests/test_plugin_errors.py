"""Errors: what each tells, how bare ones are sorted, and how much of one a record keeps."""

from __future__ import annotations

from typing import Any

import pytest
from plugin_substrate import (
    ErrorCategory,
    JobError,
    PluginCancelledError,
    PluginConfigError,
    PluginDisabledError,
    PluginError,
    PluginFatalError,
    PluginInputError,
    PluginNotLoadedError,
    PluginResourceError,
    PluginTimeoutError,
    PluginTransientError,
    ResourceShortfall,
    TracebackPolicy,
    WireValueError,
    WorkerOOMError,
)
from plugin_substrate.errors import WIRE_ERRORS, classify_exception, map_bare_exception_to_job_error
from plugin_substrate.worker.failures import describe_error, restore_error


@pytest.mark.parametrize(
    ("cls", "category", "retriable"),
    [
        (PluginInputError, "user_input", True),
        (PluginConfigError, "user_input", True),
        (PluginDisabledError, "user_input", True),
        (PluginTransientError, "transient", True),
        (PluginTimeoutError, "transient", True),
        (PluginCancelledError, "transient", False),
        (PluginResourceError, "resource", True),
        (WorkerOOMError, "resource", True),
        (PluginFatalError, "fatal", False),
        (PluginNotLoadedError, "fatal", False),
    ],
)
def test_each_class_has_its_category_and_whether_to_try_again(
    cls: type[PluginError], category: str, retriable: bool
) -> None:
    error = cls("x")
    assert (error.category, error.retriable) == (category, retriable)
    assert cls("x", retriable=not retriable).retriable is not retriable


@pytest.mark.parametrize(
    ("path", "category"),
    [("args[0].when", "user_input"), ("kwargs.variables.x", "user_input"), ("result.rows[3]", "fatal"), ("", "fatal")],
)
def test_a_value_that_cannot_cross_is_the_fault_of_who_made_it(path: str, category: str) -> None:
    assert JobError.from_exception(WireValueError("x", path=path)).category == category


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (FileNotFoundError("x"), "user_input"),
        (NotADirectoryError("x"), "user_input"),
        (IsADirectoryError("x"), "user_input"),
        (PermissionError("x"), "user_input"),
        (KeyError("x"), "user_input"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "x"), "user_input"),
        (TypeError("x"), "user_input"),
        (TimeoutError("x"), "transient"),
        (ConnectionResetError("x"), "transient"),
        (InterruptedError("x"), "transient"),
        (BlockingIOError("x"), "transient"),
        (OSError("x"), "transient"),
        (MemoryError("x"), "resource"),
        (ZeroDivisionError("x"), "fatal"),
        (SystemExit(3), "fatal"),
    ],
)
def test_bare_exceptions_are_sorted(error: BaseException, category: str) -> None:
    assert classify_exception(error)("x").category == category
    record = map_bare_exception_to_job_error(error, plugin_name="reader", plugin_instance_id="second")
    assert (record.category, record.plugin_name, record.plugin_instance_id) == (category, "reader", "second")
    assert record.original_exc_repr == repr(error)
    assert record.occurred_at.tzinfo is not None


SAMPLES: dict[str, dict[str, Any]] = {
    "PluginInputError": {"fields_invalid": ["a", "b"]},
    "PluginConfigError": {"fields_invalid": ["a"], "config_class": "Settings"},
    "PluginDisabledError": {"plugin_name": "reader"},
    "PluginTransientError": {"retry_after_seconds": 7.5},
    "PluginTimeoutError": {"timeout_seconds": 3.0, "retry_after_seconds": 1.0},
    "PluginCancelledError": {},
    "PluginResourceError": {"resource_shortfall": ResourceShortfall("gpu", 10, 4)},
    "PluginFatalError": {},
    "WireValueError": {"path": "result.rows[3]"},
}


def test_every_error_that_crosses_the_border_is_sampled() -> None:
    assert set(SAMPLES) == set(WIRE_ERRORS)


@pytest.mark.parametrize("name", sorted(SAMPLES))
@pytest.mark.parametrize("retriable", [True, False])
def test_a_typed_error_arrives_whole(name: str, retriable: bool) -> None:
    sent = WIRE_ERRORS[name]("the reason", retriable=retriable, **SAMPLES[name])
    arrived = restore_error(describe_error(sent))
    assert type(arrived) is type(sent)
    assert (str(arrived), arrived.retriable) == ("the reason", retriable)
    assert arrived.to_fields() == sent.to_fields()


def test_a_record_keeps_as_much_of_an_error_as_its_policy_says() -> None:
    with pytest.raises(ValueError, match="s3cret") as caught:
        int("s3cret")
    records = {policy: JobError.from_exception(caught.value, policy=policy) for policy in TracebackPolicy}
    full, short, none = (records[TracebackPolicy(policy)] for policy in ("full", "repr_only", "none"))
    assert "Traceback" in full.traceback
    assert (short.traceback, short.original_exc_repr) == ("", full.original_exc_repr)
    assert short.message == full.message
    assert "s3cret" not in repr(none)
    assert (none.message, none.category, none.retriable) == ("", ErrorCategory.USER_INPUT, True)


def test_running_out_of_memory_is_a_lack_of_resources_whose_effect_is_not_known() -> None:
    error = WorkerOOMError("killed", process_returncode=-9, log_tail=["last"])
    assert isinstance(error, PluginResourceError)
    assert (error.process_returncode, error.log_tail, error.outcome_known) == (-9, ("last",), False)
