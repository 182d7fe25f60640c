"""The one exception that means "the user can fix this": shown as one line, exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in configuration, data or layout, with what is wrong, where, what is allowed and what to do."""
