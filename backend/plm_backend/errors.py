"""Errors of the application, beside those of the packages below it.

BackendError
└── SetupError    the operator must change something before the application can start: `remedy` says what
"""

from __future__ import annotations


class BackendError(Exception):
    """Base of everything the application raises on purpose."""


class SetupError(BackendError):
    """The application cannot start as it is configured; one sentence says what to do."""
