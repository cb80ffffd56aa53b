"""The message of a call, made before anything is sent: what cannot cross is an error while nothing has happened yet."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from plugin_substrate.arguments import any_files, with_paths
from plugin_substrate.errors import ProtocolError, WireValueError
from plugin_substrate.interface import CallContext
from plugin_substrate.worker.messages import Message, encode_message
from plugin_substrate.worker.parked import is_parking_called_for
from plugin_substrate.worker.values import pack_value


def new_call() -> CallContext:
    """Return the context of a call that was given none: an id, and nobody who asked."""
    return CallContext(call_id=os.urandom(16).hex())


def encode_call(context: CallContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Message:
    """Return a call's message, ready to send; a `WireValueError` names what cannot cross. In any thread."""
    return _message(context, _pack(args, kwargs))


class CallArguments:
    """The arguments of one call. They are packed once, and only when it is known that the call may be made."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs
        self._packed: list[bytes] | None = None

    @property
    def any_files(self) -> bool:
        """Whether some may have to be written to files first."""
        return any_files(self.args, self.kwargs)

    async def with_paths(self) -> CallArguments:
        """Return them with a path in the place of each `FileBackedDTO`; see `arguments.with_paths`."""
        return CallArguments(*await with_paths(self.args, self.kwargs)) if self.any_files else self

    def small_message(self, context: CallContext) -> Message | None:
        """Return the call's message as `encode_call` does; None where that takes long, which is left to `message`."""
        if self._packed is not None:
            return None
        segments = _pack(self.args, self.kwargs)
        if is_parking_called_for(segments):
            self._packed = segments
            return None
        return _message(context, segments)

    async def message(self, context: CallContext, *, stream: bool = False) -> Message:
        """Return the call's message; what takes long, as does filling memory files, is done in another thread."""
        segments, self._packed = self._packed or _pack(self.args, self.kwargs), None
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
