"""A server with a key signs what happens; a copy of it kept elsewhere shows that nobody has changed anything since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg


def test_what_a_server_did_is_signed_exported_and_found_unforged(
    launch: Any, platform: Any, until: Any, cli: Any, tmp_path: Path
) -> None:
    key, public, file = tmp_path / "key.pem", tmp_path / "public.pem", tmp_path / "events.jsonl"
    public.write_text(cli("events", "new-key", "--to", str(key), environment=platform.environment).stdout)
    # on a database of its own: another server would sign there too, with another key
    with launch(PLM_EVENTS_KEY=str(key), PLM_CHECKPOINT_SECONDS="0.2") as server:
        tenant = str(server.tenant)
        run_id = server.client().run("echo")["run_id"]
        server.client().finished(run_id)

        def exported() -> bool:
            file.unlink(missing_ok=True)
            written = server.cli("events", "export", "--tenant-id", tenant, "--to", str(file))
            return written.returncode == 0 and f"run/{run_id}".encode() in file.read_bytes()

        until(exported, "a checkpoint covers the run")
        checked = server.cli(
            *("events", "verify", "--tenant-id", tenant, "--export", str(file)), "--public-key", str(public), "--json"
        )
    answer = json.loads(checked.stdout)
    assert answer["unforged_up_to_checkpoint"] >= 1
    assert f"run/{run_id}" in {stream["stream"] for stream in answer["streams"]}
    private = key.read_text(encoding="ascii").splitlines()[1]
    assert private not in server.log.read_text(encoding="utf-8")


def test_what_a_server_signs_is_archived_continuously_and_the_archive_shows_that_nothing_was_changed(
    launch: Any, platform: Any, until: Any, cli: Any, tmp_path: Path
) -> None:
    key, public, archive = tmp_path / "key.pem", tmp_path / "public.pem", str(tmp_path / "archive")
    public.write_text(cli("events", "new-key", "--to", str(key), environment=platform.environment).stdout)
    often = {"PLM_CHECKPOINT_SECONDS": "0.2", "PLM_ARCHIVE_SECONDS": "0.2"}
    with launch(PLM_EVENTS_KEY=str(key), PLM_EVENTS_ARCHIVE=archive, **often) as server:
        about = ("--tenant-id", str(server.tenant), "--archive", archive, "--public-key", str(public), "--json")
        finished: list[str] = []
        for _ in range(2):
            finished.append(server.client().run("echo")["run_id"])
            server.client().finished(finished[-1])

            def archived() -> bool:
                written = [piece.read_bytes() for piece in Path(archive).glob(f"{server.tenant}/events/*.jsonl")]
                return any(f"run/{finished[-1]}".encode() in piece for piece in written)

            until(archived, "a piece of the archive holds the run")
        alone = json.loads(server.cli("events", "archive", "verify", *about).stdout)
        answer = json.loads(server.cli("events", "verify", *about).stdout)
        with psycopg.connect(server.environment["PG_ADMIN_DSN"]) as owner:
            owner.execute("SELECT set_config('app.tenant_id', %s, false)", [str(server.tenant)])
            told = "SELECT payload ->> 'actor', count(*) FROM audit_log WHERE actor_kind = 'system' GROUP BY 1"
            acted = dict(owner.execute(told).fetchall())
    # Once each, of hundreds of passes: who worked in the tenant with nobody's token.
    assert acted == {f"system:{each}": 1 for each in ("recovery", "checkpoints", "archive")}
    assert alone["unforged"]
    assert answer["unforged_up_to_checkpoint"] >= 2
    assert {f"run/{run_id}" for run_id in finished} <= {stream["stream"] for stream in answer["streams"]}


def test_a_reader_of_the_feed_whom_pruning_overtook_is_told_once_and_given_its_cursor(
    launch: Any, platform: Any, cli: Any, tmp_path: Path
) -> None:
    key, archive = tmp_path / "key.pem", str(tmp_path / "archive")
    cli("events", "new-key", "--to", str(key), environment=platform.environment)
    with launch(PLM_EVENTS_KEY=str(key), PLM_CHECKPOINT_SECONDS="3600", PLM_RUN_CONCURRENCY="0") as server:
        client, ours = server.client(), ("--tenant-id", str(server.tenant))

        def run(*words: str) -> None:
            done = server.cli("events", *words, *ours)
            assert done.returncode == 0, done.stderr

        behind = client.get("/v1/events").json()["next"]
        assert client.post(f"/v1/runs/{client.run('echo')['run_id']}/cancel").status_code == 200
        run("checkpoint")
        run("archive", "write", "--archive", archive)
        run("archive", "keep", "--days", "5")
        owner = server.database()
        owner.execute("ALTER TABLE event_checkpoints DISABLE TRIGGER USER")
        owner.execute("UPDATE event_checkpoints SET taken_at = taken_at - interval '9 days'")
        run("archive", "prune")
        refused = client.get("/v1/events", params={"cursor": behind})
        assert (refused.status_code, refused.json()["reason"]) == (409, "feed_pruned")
        rest = client.get("/v1/events", params={"cursor": refused.json()["cursor"]})
        assert (rest.status_code, [each["kind"] for each in rest.json()["items"]]) == (200, ["events_pruned"])
        assert client.get("/v1/events", params={"cursor": rest.json()["next"]}).json()["items"] == []
