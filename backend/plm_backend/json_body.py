"""Request bodies: JSON in UTF-8 that says one thing, or a refusal that says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

UNREADABLE = 400
UNSUPPORTED = 415


class JsonRoute(APIRoute):
    """A route whose body, where it takes one, is JSON (RFC 8259).

    Answers 415 to another media type or to a content coding (RFC 9110, section 15.5.16), 400 to what is no UTF-8, no
    JSON, nested too deeply, or an object that holds a name twice, of which every reader makes something else.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, which sees bodies through `parse`."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if self.body_field is not None:
                _require_plain_json(request)
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        return parse(await self.body())


def parse(body: bytes) -> Any:
    """The one value a body holds.

    Raises:
        HTTPException: 400, saying what and where.
    """
    try:
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=_each_once)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is no UTF-8; send JSON in UTF-8"
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno} is no JSON ({error.msg}); send one JSON object"
    except RecursionError:
        problem = "it is nested too deeply; send a flatter object"
    except _NameTwiceError as error:
        problem = f"an object holds the name {error.name!r:.80} twice; send it once"
    except ValueError:
        problem = "it holds a number of more digits than anybody can read; send it as text"
    raise HTTPException(UNREADABLE, f"the body cannot be read: {problem}")


class _NameTwiceError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _NameTwiceError(name)
        found[name] = value
    return found


def _require_plain_json(request: Request) -> None:
    if "transfer-encoding" not in request.headers and request.headers.get("content-length", "0") == "0":
        return  # no body at all: the schema says what is missing
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        said = f"the media type {kind!r:.80}" if kind else "no media type"
        raise HTTPException(UNSUPPORTED, f"the body has {said}; send JSON with `Content-Type: application/json`")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise HTTPException(
            UNSUPPORTED,
            f"the body has the content coding {coding!r:.80}; send it as it is, without Content-Encoding",
            headers={"Accept-Encoding": "identity"},
        )
