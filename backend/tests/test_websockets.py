"""The identity middleware before a real server's WebSockets: nobody in without a token, nobody longer than it lasts."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

SECRET = "a-secret-for-tests-of-forty-characters!!"
SERVER = f"""
import uvicorn
from plm_engine_core.control_plane.identity import Hs256JwtIdentityProvider, IdentityMiddleware, InMemoryAuditSink
from plm_engine_core.control_plane.identity import require_identity

async def application(scope, receive, send):
    assert scope["type"] == "websocket"
    await receive()
    await send({{"type": "websocket.accept"}})
    await send({{"type": "websocket.send", "text": str(require_identity().user_id)}})
    while (await receive())["type"] != "websocket.disconnect":
        pass

provider = Hs256JwtIdentityProvider(active_secret={SECRET!r})
door = IdentityMiddleware(application, provider=provider, audit=InMemoryAuditSink())
uvicorn.run(door, host="127.0.0.1", port=0, lifespan="off", log_level="info")
"""


@pytest.fixture
def url(tmp_path: Path, until: Any) -> Iterator[str]:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=output, stderr=output)
    try:
        running = "Uvicorn running on http://"
        until(lambda: running in log.read_text() or process.poll() is not None, "the server starts")
        assert process.poll() is None, log.read_text()
        yield "ws://" + log.read_text().partition(running)[2].split()[0]
    finally:
        process.terminate()
        process.wait(20)


def test_nobody_opens_a_websocket_without_a_token_or_keeps_it_longer(url: str) -> None:
    user = str(uuid.uuid4())
    claims = {"sub": user, "tenant_id": str(uuid.uuid4()), "actor_kind": "human", "scopes": []}
    for headers in ({}, {"Authorization": "Bearer junk"}):
        with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=headers):
            pass
        assert refused.value.response.status_code == 401
    now = int(time.time())
    token = Hs256JwtIdentityProvider(active_secret=SECRET).issue_token({**claims, "iat": now, "exp": now + 8})
    with connect(url, additional_headers={"Authorization": f"Bearer {token}"}) as socket:
        assert socket.recv(timeout=60) == user
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=60)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, "IDENTITY_EXPIRED")
