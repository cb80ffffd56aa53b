"""What cannot be read, or has another form than documented: told which field, which value, and what to do."""

from __future__ import annotations

import gzip
import json
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

TABLE = "Form"
Refusal = tuple[Any, ...]
JSON = "application/json"


@dataclass(frozen=True)
class Cases:
    """Each answers a response, and words that its `detail` must hold."""

    _client: Any
    _own_server: Callable[..., Any]

    def _raw(self, content: bytes, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer: httpx.Response = self._client.post("/v1/runs", content=content, headers={"Content-Type": JSON, **named})
        return answer

    def _create(self, body: Any, **headers: str) -> httpx.Response:
        return self._raw(json.dumps(body).encode(), **headers)

    def unknown_address(self) -> Refusal:
        for path in ("/", "/v1", "//v1/runs", "/v1/runs/", "/docs", "/v1/\u00fc"):
            assert self._client.get(path).status_code == 404
        return self._client.get("/v1/nothing"), "/v1/nothing", "/openapi.json"

    def unknown_method(self) -> Refusal:
        for method, path in (("HEAD", "/v1/runs"), ("OPTIONS", "/v1/runs"), ("PATCH", f"/v1/runs/{uuid.uuid4()}")):
            assert self._client.request(method, path).status_code == 405
        answer = self._client.put("/v1/runs")
        assert answer.headers["allow"] == "GET, POST"
        return answer, "PUT", "/v1/runs", "use GET, POST"

    def body_that_is_not_json(self) -> Refusal:
        for junk in (b"{", b"agent=echo", b'{"agent": "echo"} {}', b"{'agent': 1}", b"\x00"):
            assert self._raw(junk).status_code == 400
        return self._raw(b'{"agent": "echo",\n}'), "line 2, column 1", "send one JSON object"

    def body_that_is_no_utf_8(self) -> Refusal:
        assert self._raw('{"agent": "echo"}'.encode("utf-16")).status_code == 400
        return self._raw(b'{"agent": "\xff"}'), "byte 11", "UTF-8"

    def body_nested_too_deeply_to_read(self) -> Refusal:
        return self._raw(b"[" * 200_000), "nested too deeply"

    def body_with_a_name_twice(self) -> Refusal:
        return self._raw(b'{"agent": "echo", "inputs": {"value": "a", "value": "b"}}'), "'value' twice", "send it once"

    def body_with_an_endless_number(self) -> Refusal:
        return self._raw(b'{"agent": "echo", "inputs": {"count": ' + b"9" * 5000 + b"}}"), "digits", "as text"

    def body_of_another_media_type(self) -> Refusal:
        for kind in ("", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", "json"):
            assert self._raw(b'{"agent": "echo"}', Content_Type=kind).status_code == 415
        assert self._raw(b'{"agent": "echo"}', Content_Type="Application/JSON ; charset=utf-8").status_code == 202
        return self._raw(b"agent: echo", Content_Type="application/yaml"), "'application/yaml'", JSON

    def compressed_body(self) -> Refusal:
        answer = self._raw(gzip.compress(b'{"agent": "echo"}'), Content_Encoding="gzip")
        assert answer.headers["accept-encoding"] == "identity"
        return answer, "'gzip'", "send it as it is"

    def body_too_large_announced(self) -> Refusal:
        large = json.dumps({"agent": "echo", "inputs": {"value": "x" * 8192}}).encode()
        return self._to_small_server(large)

    def body_too_large_in_pieces(self) -> Refusal:
        return self._to_small_server(b'{"agent": "' + b"x" * 1000 for _ in range(10))

    def _to_small_server(self, content: Any) -> Refusal:
        with self._own_server(PLM_MAX_BODY_BYTES="4096") as server:
            answer = server.client().post("/v1/runs", content=content, headers={"Content-Type": JSON})
            assert server.client().post("/v1/runs", json={"agent": "echo"}).status_code == 202
            return answer, "4096 bytes", "send less"

    def no_body(self) -> Refusal:
        assert self._raw(b"").status_code == 422
        return self._client.post("/v1/runs"), "body: Field required", "correct it"

    def unknown_member(self) -> Refusal:
        return self._create({"agent": "echo", "surprise": 1}), "body.surprise", "not permitted", "correct it"

    def text_with_nul(self) -> Refusal:
        assert self._create({"agent": "a\x00b"}).status_code == 422
        return self._create({"agent": "echo", "inputs": {"value": "a\x00b"}}), "inputs.value", "U+0000", "remove it"

    def half_a_surrogate_pair(self) -> Refusal:
        assert self._create({"agent": "\ud800"}).status_code == 422
        assert self._create({"agent": "echo", "\ud800": 1}).status_code == 422
        assert self._create({"agent": "echo", "inputs": {"\ud800": 1}}).status_code == 422
        return self._create({"agent": "echo", "inputs": {"table": {"k": ["\ud800"]}}}), "inputs.table.k[0]", "remove it"

    def number_that_json_does_not_have(self) -> Refusal:
        assert self._raw(b'{"agent": "echo", "inputs": {"ratio": 1e999}}').status_code == 422
        return self._raw(b'{"agent": "echo", "inputs": {"ratio": NaN}}'), "inputs.ratio", "nan", "use null or text"

    def value_nested_too_deeply_to_keep(self) -> Refusal:
        deep = b'{"agent": "echo", "inputs": {"table": ' + b'{"a":' * 800 + b"1" + b"}" * 800 + b"}}"
        answer = self._raw(deep)
        assert len(answer.json()["detail"]) < 1000
        return answer, "inputs.table.a", "nested deeper than 200 levels"

    def unknown_agent(self) -> Refusal:
        return self._create({"agent": "nobody"}), "'nobody'", "this installation has: ", "echo"

    def unknown_input(self) -> Refusal:
        return self._create({"agent": "echo", "inputs": {"volume": 11}}), "'volume'", "it takes count, flag"

    def missing_input(self) -> Refusal:
        return self._create({"agent": "fail"}), "'kind' of type string", "give it under 'inputs'"

    def input_of_another_type(self) -> Refusal:
        return self._create({"agent": "echo", "inputs": {"count": "many"}}), "count", "type integer", "'many'"

    def file_that_cannot_be_decoded(self) -> Refusal:
        file = {"name": "a", "base64": "%%%"}
        return self._create({"agent": "read-file", "files": {"file": file}}), "the file file", "base64 (RFC 4648)"

    def budget_in_an_unknown_unit(self) -> Refusal:
        answer = self._create({"agent": "echo", "budget": {"hours": "1"}})
        assert answer.json()["field"] == "budget.hours"
        return answer, "'EUR' or 'calls'", "not 'hours'"

    def same_idempotency_key_with_another_body(self) -> Refusal:
        key = str(uuid.uuid4())
        first = self._create({"agent": "echo"}, Idempotency_Key=key)
        again = self._create({"agent": "echo"}, Idempotency_Key=key)
        assert (first.status_code, again.status_code) == (202, 202)
        assert (again.json()["run_id"], again.headers["idempotent-replayed"]) == (first.json()["run_id"], "true")
        answer = self._create({"agent": "echo", "inputs": {"value": "other"}}, Idempotency_Key=key)
        return answer, key, "choose another key"

    def same_idempotency_key_from_two_clients_at_once_with_two_bodies(self) -> Refusal:
        key, start, answers = str(uuid.uuid4()), threading.Barrier(8), []

        def send(value: str) -> None:
            start.wait()
            answers.append(self._create({"agent": "echo", "inputs": {"value": value}}, Idempotency_Key=key))

        threads = [threading.Thread(target=send, args=["ab"[number % 2]]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        accepted = [answer for answer in answers if answer.status_code == 202]
        refused = [answer for answer in answers if answer.status_code != 202]
        assert (len(accepted), len(refused)) == (4, 4)
        assert len({answer.json()["run_id"] for answer in accepted}) == 1
        return refused[0], key, "choose another key"

    def idempotency_key_too_long(self) -> Refusal:
        return self._create({"agent": "echo"}, Idempotency_Key="k" * 256), "header.idempotency-key", "255 characters"

    def idempotency_key_sent_twice(self) -> Refusal:
        for name in ("Content-Type", "Last-Event-ID"):
            twice = [("Content-Type", JSON), ("Idempotency-Key", "a"), (name, JSON), (name, JSON)]
            assert self._client.post("/v1/runs", json={"agent": "echo"}, headers=twice).status_code == 422
        twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
        answer = self._client.post("/v1/runs", json={"agent": "echo"}, headers=twice)
        assert answer.json()["field"] == "header.idempotency-key"
        return answer, "idempotency-key was sent 2 times", "send it once"

    def parameter_sent_twice(self) -> Refusal:
        for path in ("runs", "approvals", f"runs/{uuid.uuid4()}"):
            assert self._client.get(f"/v1/{path}?state=a&state=a").status_code == 422
        return self._client.get("/v1/runs?limit=1&limit=200"), "limit was sent 2 times", "send it once"

    def limit_out_of_range(self) -> Refusal:
        for limit in ("0", "201", "many", "1e3", "9" * 30, "", "1.5"):
            for path in ("/v1/runs", "/v1/approvals"):
                assert self._client.get(path, params={"limit": limit}).status_code == 422
        return self._client.get("/v1/runs?limit=-1"), "query.limit", "greater than or equal to 1", "not '-1'"

    def cursor_of_nobody(self) -> Refusal:
        for cursor in ("", "W10=", "e30=", "%00", "%ff", "a" * 600, "WyIyMDI2LTAxLTAxIiwgMV0="):
            for path in ("/v1/runs", "/v1/approvals", "/v1/events"):
                assert self._client.get(f"{path}?cursor={cursor}").status_code == 422
        return self._client.get("/v1/runs?cursor=junk"), "cursor", "leave it out"

    def unknown_state_to_filter_by(self) -> Refusal:
        assert self._client.get("/v1/approvals?state=lost").status_code == 422
        return self._client.get("/v1/runs?state=lost"), "query.state", "'queued'", "not 'lost'"

    def last_event_id_of_nobody(self) -> Refusal:
        run_id = self._client.run("echo")["run_id"]
        self._client.finished(run_id)
        path = f"/v1/runs/{run_id}/events"
        for junk in ("-1", "1.5", "9" * 30, "1 2", "x" * 20_000):
            assert self._client.get(path, headers={"Last-Event-ID": junk}).status_code == 422
        return self._client.get(path, headers={"Last-Event-ID": "abc"}), "Last-Event-ID", "'abc'", "leave it out"


@pytest.fixture
def cases(client: Any, own_server: Callable[..., Any]) -> Cases:
    return Cases(client, own_server)


def test_what_has_another_form_than_documented_is_told_what_to_correct(row: Any, cases: Cases, refused: Any) -> None:
    refused(row, *getattr(cases, row.method)())


def test_every_row_has_its_scenario(unasked: set[str]) -> None:
    assert unasked == set()
