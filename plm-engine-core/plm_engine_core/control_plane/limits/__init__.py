"""Budgets and rates: what may be spent, and how fast."""

from plm_engine_core.control_plane.limits.budgets import Budget, Reserve, demand
from plm_engine_core.control_plane.limits.rate_limit import RateReading

__all__ = ["Budget", "RateReading", "Reserve", "demand"]
