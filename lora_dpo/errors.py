"""Errors that reach the user: what went wrong, where, and what to do next."""

from __future__ import annotations


class LoraDpoError(Exception):
    """A failure that is not the user's input; the command line exits with 1."""

    exit_code = 1


class UserError(LoraDpoError):
    """The user's input can't be used; the command line prints it without a traceback and exits with 2.

    Args:
        what: the problem, in one sentence.
        where: the file, row, key or option it was found in.
        hint: what to do next.
    """

    exit_code = 2

    def __init__(self, what: str, where: object | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, None if where is None else str(where), hint
        text = f"{self.where}: {what}" if self.where else what
        super().__init__(f"{text}\n  → {hint}" if hint else text)
