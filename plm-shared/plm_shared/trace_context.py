"""Which tenant, trace and span the running code belongs to."""

from __future__ import annotations

import secrets
from contextvars import ContextVar, Token
from dataclasses import dataclass

from plm_shared.traceparent import Traceparent, parse_traceparent, reset_traceparent, set_traceparent

__all__ = [
    "ContextHandle",
    "TraceContext",
    "child_span",
    "continued_context",
    "current_context",
    "new_root_context",
    "reset_context",
    "set_context",
]

_context: ContextVar[TraceContext | None] = ContextVar("trace_context", default=None)


@dataclass(frozen=True)
class TraceContext:
    """A span of a tenant's trace."""

    tenant_id: str
    trace_id: str
    span_id: str
    parent_span_id: str | None = None


@dataclass(frozen=True)
class ContextHandle:
    """What ``reset_context`` needs; handles nest, the last set is reset first."""

    context: Token[TraceContext | None]
    traceparent: Token[str | None] | None


def set_context(context: TraceContext) -> ContextHandle:
    """Bind the context, and its ``traceparent`` header when the ids are such as W3C asks for."""
    token = _context.set(context)
    header = f"00-{context.trace_id}-{context.span_id}-01".lower()
    return ContextHandle(context=token, traceparent=set_traceparent(header) if parse_traceparent(header) else None)


def reset_context(handle: ContextHandle) -> None:
    """Undo ``set_context``, both the context and the header."""
    _context.reset(handle.context)
    if handle.traceparent is not None:
        reset_traceparent(handle.traceparent)


def current_context() -> TraceContext | None:
    """The bound context, or None."""
    return _context.get()


def child_span(*, parent: TraceContext | None = None) -> TraceContext:
    """A new span below ``parent``, by default below the bound context; it is not bound.

    Raises:
        LookupError: there is no parent.
    """
    above = parent or _context.get()
    if above is None:
        raise LookupError("no trace context is bound; pass parent=, or bind one with set_context")
    return TraceContext(
        tenant_id=above.tenant_id, trace_id=above.trace_id, span_id=_new_span_id(), parent_span_id=above.span_id
    )


def new_root_context(*, tenant_id: str) -> TraceContext:
    """The first span of a new trace."""
    return TraceContext(tenant_id=tenant_id, trace_id=secrets.token_hex(16), span_id=_new_span_id())


def continued_context(inbound: Traceparent, *, tenant_id: str) -> TraceContext:
    """A span of a trace that a caller began: its trace id, and its span as parent."""
    return TraceContext(
        tenant_id=tenant_id, trace_id=inbound.trace_id, span_id=_new_span_id(), parent_span_id=inbound.span_id
    )


def _new_span_id() -> str:
    return secrets.token_hex(8)
