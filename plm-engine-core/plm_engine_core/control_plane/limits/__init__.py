"""Budgets, rates, leases and locks: what may be spent, how fast, and who may touch what."""

from plm_engine_core.control_plane.limits.budgets import (
    Budget,
    BudgetKey,
    BudgetPlan,
    Limit,
    Reserve,
    SubjectZone,
    Unit,
)
from plm_engine_core.control_plane.limits.leases import ResourceLease
from plm_engine_core.control_plane.limits.locks import ResourceLock
from plm_engine_core.control_plane.limits.rate_limit import Assumed, Bucket, Dimension, Prepared, RateReading
from plm_engine_core.control_plane.limits.subjects import Subjects

__all__ = [
    "Assumed",
    "Bucket",
    "Budget",
    "BudgetKey",
    "BudgetPlan",
    "Dimension",
    "Limit",
    "Prepared",
    "RateReading",
    "Reserve",
    "ResourceLease",
    "ResourceLock",
    "SubjectZone",
    "Subjects",
    "Unit",
]
