"""Errors of the application, beside those of the packages below it.

BackendError
├── SetupError      the operator must change something before the application can start
└── DatabaseLost    a run worker gave up on its database
"""

from __future__ import annotations


class BackendError(Exception):
    """Base of everything the application raises on purpose."""


class SetupError(BackendError):
    """The application cannot start as it is configured; one sentence says what to do."""


class DatabaseLost(BackendError):
    """The database did not come back in the time that a run worker waits for it."""
