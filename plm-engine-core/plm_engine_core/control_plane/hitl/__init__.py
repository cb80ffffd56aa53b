"""Humans in the loop: tickets and the gate that decides them."""

from plm_engine_core.control_plane.hitl.gate import ApprovalGate
from plm_engine_core.control_plane.hitl.ticket import ApprovalTicket

__all__ = ["ApprovalGate", "ApprovalTicket"]
