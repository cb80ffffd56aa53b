"""The message of a call, made before anything is sent: what cannot cross is an error while nothing has happened yet."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from plugin_substrate.errors import ProtocolError, WireValueError
from plugin_substrate.interface import CallContext
from plugin_substrate.worker.messages import Message, encode_message
from plugin_substrate.worker.parked import is_parking_called_for
from plugin_substrate.worker.values import pack_value


def new_call_id() -> str:
    """Return an id for a call that was given none."""
    return os.urandom(16).hex()


def encode_call(
    context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any], *, stream: bool = False
) -> Message:
    """Return a call's message, ready to send; a `WireValueError` names what cannot cross. In any thread."""
    return _message(context, _pack(args, kwargs), stream)


def encode_small_call(context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Message | None:
    """As `encode_call`, or None for a call whose message takes so long to make that an event loop must not do it."""
    segments = _pack(args, kwargs)
    return None if is_parking_called_for(segments) else _message(context, segments)


async def encode_call_async(
    context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any], *, stream: bool = False
) -> Message:
    """As `encode_call`; what takes long, as does filling memory files, is done in another thread."""
    segments = _pack(args, kwargs)
    if not is_parking_called_for(segments):
        return _message(context, segments, stream)
    return await asyncio.to_thread(_message, context, segments, stream)


def _pack(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bytes]:
    return pack_value({"args": list(args), "kwargs": kwargs}, "")


def _message(context: CallContext, segments: list[bytes], stream: bool = False) -> Message:
    header = {"type": "call", "context": vars(context)}
    try:
        return encode_message({**header, "stream": True} if stream else header, segments)
    except ProtocolError as error:
        raise WireValueError(f"the arguments are too large: {error}", path="args") from error
