"""A server with a key signs what happens; a copy of it kept elsewhere shows that nobody has changed anything since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_what_a_server_did_is_signed_exported_and_found_unforged(
    launch: Any, platform: Any, until: Any, cli: Any, tmp_path: Path
) -> None:
    key, public, file = tmp_path / "key.pem", tmp_path / "public.pem", tmp_path / "events.jsonl"
    public.write_text(cli("events", "new-key", "--to", str(key), environment=platform.environment).stdout)
    with launch(like=platform, PLM_EVENTS_KEY=str(key), PLM_CHECKPOINT_SECONDS="0.2") as server:
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
