"""Errors that a person can act on: one clear line, no traceback on the command line."""

from __future__ import annotations


class CounterlensError(Exception):
    """Something failed (exit code 1)."""

    exit_code = 1


class UsageError(CounterlensError, ValueError):
    """Something was asked for that does not make sense (exit code 2)."""

    exit_code = 2
