"""Events: a run's own stream, every event once, in order, resumable; and the feed over all of a tenant's."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest


@pytest.fixture
def finished_run(client: Any) -> str:
    run_id: str = client.run("echo")["run_id"]
    client.finished(run_id)
    return run_id


def test_every_event_comes_once_in_order_and_the_stream_ends_with_the_run(client: Any, finished_run: str) -> None:
    messages = list(client.events(finished_run))
    assert [int(message.id) for message in messages] == list(range(1, len(messages) + 1))
    kinds = [message.event for message in messages]
    assert kinds == ["run_created", "run_taken", "step_granted", "step_started", "step_settled", "run_succeeded"]
    document = json.loads(messages[0].data)
    assert document.keys() == {"seq", "kind", "actor", "occurred_at", "hash", "payload"}


def test_a_client_that_was_there_from_the_start_sees_the_same_as_one_that_came_later(client: Any, gate: Any) -> None:
    run_id = client.run("hold-then-echo", gate=str(gate))["run_id"]
    live = []
    for message in client.events(run_id):
        live.append(message)
        if message.event == "step_started":
            gate.open()
    recorded = [(each.id, each.event, each.data) for each in live if each.event != "progress"]
    assert recorded == [(each.id, each.event, each.data) for each in client.events(run_id)]


def test_progress_passes_without_being_an_event(client: Any, gate: Any) -> None:
    run_id = client.run("beat", gate=str(gate))["run_id"]
    last_id, report = "", None
    for message in client.events(run_id):
        if message.event == "progress":
            assert message.id == last_id, "a report must not move the place to resume from"
            report = json.loads(message.data)
            gate.open()
        last_id = message.id
    assert report == {"step": 0, "step_id": "act", "fraction": 0.5, "message": "at the gate"}


def test_a_stream_resumes_after_the_last_event_that_was_seen(client: Any, finished_run: str) -> None:
    everything = [message.id for message in client.events(finished_run)]
    for seen in range(len(everything) + 1):
        after = everything[seen - 1] if seen else 0
        assert [message.id for message in client.events(finished_run, after=after)] == everything[seen:]


@pytest.mark.parametrize("junk", ["abc", "-1", "1.5", "9" * 30, "1 2", "\u00b2".encode().decode("latin-1")])
def test_a_last_event_id_that_no_stream_gave_is_refused(client: Any, finished_run: str, junk: str) -> None:
    answer = client.get(f"/v1/runs/{finished_run}/events", headers={"Last-Event-ID": junk.encode("latin-1")})
    assert (answer.status_code, answer.json()["field"]) == (422, "Last-Event-ID")


def test_a_client_that_goes_away_does_not_cancel_the_run(client: Any, gate: Any) -> None:
    run_id = client.run("hold", gate=str(gate))["run_id"]
    client.wait(run_id, "step_started")  # leaves the stream in the middle
    gate.open()
    assert client.finished(run_id)["state"] == "succeeded"


def test_the_feed_shows_every_event_of_every_run_in_pages_of_any_size(client: Any, finished_run: str) -> None:
    before, cursor = _feed(client, None, limit=200)
    other = client.run("echo")["run_id"]
    client.finished(other)
    one_by_one, _ = _feed(client, cursor, limit=1)
    everything, _ = _feed(client, None, limit=200)
    for run_id in (finished_run, other):
        streamed = [json.loads(message.data) for message in client.events(run_id)]
        for fed in (before + one_by_one, everything):
            of_run = [(each["seq"], each["kind"], each["hash"]) for each in fed if each["stream"] == f"run/{run_id}"]
            assert of_run == [(each["seq"], each["kind"], each["hash"]) for each in streamed]


def _feed(client: Any, cursor: str | None, *, limit: int) -> tuple[list[dict[str, Any]], str]:
    """What the feed has after a cursor, read to its end in pages of so many, and the cursor to go on with."""
    seen: list[dict[str, Any]] = []
    while True:
        page = client.get("/v1/events", params={"limit": limit, **({"cursor": cursor} if cursor else {})}).json()
        cursor = page["next"]
        seen += page["items"]
        if not page["items"] and page["held_back"] is None:
            return seen, cursor


def test_a_tenant_has_its_chains_verified_whole_or_one_stream_of_them(client: Any, finished_run: str) -> None:
    whole = client.get("/v1/events/verification").json()
    assert (whole["consistent"], whole["broken"], whole["broken_streams"]) == (True, [], 0)
    one = client.get("/v1/events/verification", params={"stream": f"run/{finished_run}"}).json()
    recorded = len(list(client.events(finished_run)))
    assert one == {"consistent": True, "streams": 1, "events": recorded, "broken_streams": 0, "broken": []}
    assert whole["streams"] > 1
    assert whole["events"] > recorded


def test_a_stream_of_nobody_is_not_found_and_one_that_none_can_have_is_refused(client: Any) -> None:
    answer = client.get("/v1/events/verification", params={"stream": "run/none"})
    assert (answer.status_code, answer.json()["code"]) == (404, "validation/run_not_found")
    answer = client.get("/v1/events/verification", params={"stream": "run/\x00"})
    assert (answer.status_code, [each["field"] for each in answer.json()["fields"]]) == (422, ["query.stream"])


def test_an_event_that_was_changed_is_named_by_its_stream_and_number(launch: Any) -> None:
    with launch() as server:
        client = server.client()
        whole, run_id = (client.run("echo")["run_id"] for _ in range(2))
        for each in (whole, run_id):
            client.finished(each)
        recorded = len(list(client.events(whole)))
        with psycopg.connect(server.environment["PG_ADMIN_DSN"]) as owner:
            owner.execute("ALTER TABLE events DISABLE TRIGGER USER, NO FORCE ROW LEVEL SECURITY")
            changed = "UPDATE events SET actor = 'human:nobody' WHERE stream = %s AND seq = 3"
            assert owner.execute(changed, [f"run/{run_id}"]).rowcount == 1
        answers = [
            client.get("/v1/events/verification", params=asked).json() for asked in ({}, {"stream": f"run/{run_id}"})
        ]
    for answer in answers:
        assert (answer["consistent"], answer["broken_streams"]) == (False, 1)
        (broken,) = answer["broken"]
        assert (broken["stream"], broken["events"], broken["first_bad_seq"]) == (f"run/{run_id}", 2, 3)
        assert broken["problem"]
    assert [(answer["streams"], answer["events"]) for answer in answers] == [(2, recorded + 2), (1, 2)]
