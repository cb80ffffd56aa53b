"""Humans in the loop: tickets, votes, comments, approval scopes, and the gate that all of them pass."""

from plm_engine_core.control_plane.hitl.gate import ApprovalGate
from plm_engine_core.control_plane.hitl.ticket import (
    ApprovalScope,
    ApprovalTicket,
    Comment,
    ScopeTerms,
    Vote,
    ticket_revision,
)

__all__ = ["ApprovalGate", "ApprovalScope", "ApprovalTicket", "Comment", "ScopeTerms", "Vote", "ticket_revision"]
