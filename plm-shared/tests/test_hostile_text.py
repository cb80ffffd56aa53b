"""Whatever text comes from outside, a parser answers or raises what it documents; nothing else ever gets out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plm_shared.artifact_store import ArtifactRef
from plm_shared.canonical_json import JsonRefused, canonical_json, storable_json
from plm_shared.capabilities import load_capabilities
from plm_shared.idempotency import IdempotencyKey, compute_content_hash
from plm_shared.kernel_api import EmitTelemetryArgs
from plm_shared.knowledge_envelope import KnowledgeEnvelopeV1
from plm_shared.ledger import ledger_record
from plm_shared.middleware import InvalidCoreCallerError, PlmTenantMiddleware, parse_core_caller
from plm_shared.pricing import load_price_table
from plm_shared.spool import Spool
from plm_shared.trace_context import TraceContext, current_context
from plm_shared.traceparent import is_valid_traceparent, parse_or_generate_traceparent, parse_traceparent

TENANT = str(uuid.uuid4())
NASTY = st.text(st.characters(codec=None), max_size=60) | st.sampled_from(
    [
        "\0",
        "\ud800",
        ":",
        "..",
        "\\u0000",
        "urn:uuid:" + TENANT,
        "{" + TENANT + "}",
        "\u0660" * 32,
        "\u0131",
        "%s",
        "a" * 5000,
    ]
)
JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | NASTY
    | st.builds(lambda: 2**20000)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NASTY | st.integers(), inner, max_size=4),
    max_leaves=12,
)
SHAPED = r"[0-9a-fA-F]{2}-[0-9a-fA-F]{32}-[0-9a-fA-F]{16}-[0-9a-fA-F]{2}(-.*)?"
SOAK = float(os.environ.get("SOAK", "0.05"))
quick = settings(
    max_examples=max(200, int(4000 * SOAK)), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(parts=st.lists(NASTY, min_size=5, max_size=5))
def test_a_key_is_unambiguous_or_refused(parts: list[str]) -> None:
    try:
        key = IdempotencyKey(*parts)
    except ValueError:
        return
    assert key.as_db_key().split(":", 4) == parts
    key.as_db_key().encode()
    assert len(key.as_db_key().encode()) <= 2000


@quick
@given(text=NASTY | st.from_regex(SHAPED, fullmatch=True))
def test_a_traceparent_is_strictly_w3c_or_replaced(text: str) -> None:
    parsed = parse_traceparent(text)
    assert is_valid_traceparent(text) == (parsed is not None)
    used = parse_or_generate_traceparent(text)
    assert is_valid_traceparent(used)
    assert used.isascii()
    if parsed is not None:
        assert set(parsed.trace_id) - {"0"}
        assert (len(parsed.trace_id), len(parsed.span_id), len(parsed.flags)) == (32, 16, 2)


@quick
@given(text=NASTY)
def test_a_caller_header_is_a_tenant_or_the_documented_error(text: str) -> None:
    with contextlib.suppress(InvalidCoreCallerError):
        assert isinstance(parse_core_caller(text), uuid.UUID)


BYTES = st.binary(max_size=60) | NASTY.map(lambda text: text.encode("utf-8", "surrogatepass"))
HEADERS = st.tuples(
    st.sampled_from([b"x-core-caller", b"X-CORE-CALLER", b"traceparent", b"\xff"]),
    BYTES | st.just(TENANT.encode()) | st.from_regex(SHAPED.encode(), fullmatch=True),
)


@quick
@given(headers=st.lists(HEADERS, max_size=4), kind=st.sampled_from(["http", "websocket"]))
async def test_any_headers_are_served_with_a_tenant_or_refused_with_a_status(
    headers: list[tuple[bytes, bytes]], kind: str
) -> None:
    served: list[TraceContext | None] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        served.append(current_context())

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await PlmTenantMiddleware(app)({"type": kind, "path": "/", "headers": headers}, receive, send)
    if served:
        assert served[0] is not None
        assert str(uuid.UUID(served[0].tenant_id)) == served[0].tenant_id
        assert is_valid_traceparent(f"00-{served[0].trace_id}-{served[0].span_id}-01")
    else:
        assert (sent[0].get("status"), sent[0].get("code")) in {(400, None), (None, 1008)}


@quick
@given(parts=st.lists(NASTY | st.just(TENANT), min_size=4, max_size=4))
def test_an_artifact_reference_stays_in_its_folder_or_is_refused(parts: list[str]) -> None:
    try:
        ref = ArtifactRef(*parts)
    except ValueError:
        return
    path = Path("/root/of/artifacts") / ref.relative_path
    assert path == Path(str(path)).resolve()
    assert ref.relative_path.count("/") == 2


@quick
@given(content=st.binary(max_size=200) | NASTY.map(lambda text: text.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("load", [load_capabilities, load_price_table])
def test_a_file_is_read_or_refused_with_a_value_error(tmp_path: Path, load: Any, content: bytes) -> None:
    file = tmp_path / "file.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.yaml"):
        load(file)


FRAGMENT = st.sampled_from(
    ["capabilities:", "models:", "currency: EUR", "\n", "- ", "  ", "id: read", "id: m", "&a", "*a", "<<: *a",
     "!!int 1", "{", "}", "[", "]", "input_per_1k: 1e999999", "output_per_1k: 1", "? x", ": ", "'", '"', "|", "---",
     "%YAML 1.2", "\t"]
)  # fmt: skip


@quick
@given(pieces=st.lists(FRAGMENT, max_size=30))
@pytest.mark.parametrize("load", [load_capabilities, load_price_table])
def test_any_yaml_is_read_or_refused_with_a_value_error(tmp_path: Path, load: Any, pieces: list[str]) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("".join(pieces))
    said = "file.yaml"
    try:
        load(file)
    except ValueError as error:
        said = str(error)
    assert "file.yaml" in said


@quick
@given(value=JSON_LIKE)
def test_a_payload_is_hashed_and_stored_or_refused_with_its_path(value: Any) -> None:
    for render in (canonical_json, storable_json, compute_content_hash):
        try:
            text = render(value)
        except JsonRefused as error:
            refused = error
        else:
            text.encode()
            if render is storable_json:
                json.loads(text, parse_constant=pytest.fail)
            continue
        assert refused.path.startswith("payload")


@quick
@given(value=JSON_LIKE | st.floats(allow_nan=False, allow_infinity=False) | st.dictionaries(NASTY, JSON_LIKE))
def test_what_is_stored_has_the_text_that_the_standard_library_gives_it(value: Any) -> None:
    with contextlib.suppress(JsonRefused):
        assert storable_json(value) == json.dumps(value, separators=(",", ":"), ensure_ascii=False)


@quick
@given(value=JSON_LIKE | st.dictionaries(NASTY, JSON_LIKE | st.uuids() | st.datetimes() | st.decimals()))
def test_what_is_hashed_has_the_text_that_the_standard_library_gives_it(value: Any) -> None:
    with contextlib.suppress(JsonRefused):
        text = canonical_json(value)
        assert text == json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


@pytest.mark.parametrize("power", [-5, -4, 15, 16, 17, 22])
def test_a_number_at_the_edge_of_plain_notation_has_the_text_of_the_standard_library(power: int) -> None:
    edge = 10.0**power
    numbers = [
        sign * near for sign in (1, -1) for near in (math.nextafter(edge, 0), edge, math.nextafter(edge, math.inf))
    ]
    assert storable_json([0.0, -0.0, *numbers]) == json.dumps([0.0, -0.0, *numbers], separators=(",", ":"))


@quick
@given(payload=st.dictionaries(NASTY, JSON_LIKE, max_size=3), names=st.lists(NASTY, min_size=3, max_size=3))
def test_an_event_is_rendered_or_refused(payload: dict[str, Any], names: list[str]) -> None:
    try:
        key = IdempotencyKey(TENANT, names[0], names[1], names[2], "h")
        args = EmitTelemetryArgs(
            event_type=names[2], span_id=names[1], capability="read", payload=payload, idempotency_key=key
        )
        record = ledger_record(args, tenant_id=TENANT)
    except ValueError:
        return
    assert record.columns["payload"] == payload
    assert "\n" not in record.text


@quick
@given(content=st.binary(max_size=300))
def test_a_spool_segment_of_any_bytes_is_read_to_its_end(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    (folder / "1.spool").write_bytes(content)
    spool = Spool(folder, max_bytes=10_000)
    while not spool.wait_until_empty(0):
        part = spool.take(10, 10_000)
        assert part is not None
        spool.done(part)
    spool.release()
    assert (folder / "damaged").exists() == bool(content)


@quick
@given(fields=st.dictionaries(st.sampled_from(sorted(KnowledgeEnvelopeV1.model_fields)) | NASTY, JSON_LIKE, max_size=9))
def test_a_knowledge_envelope_is_read_or_refused_with_a_value_error(fields: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError):
        KnowledgeEnvelopeV1.model_validate(fields)
