"""The one way Fivefold tells a user that their input cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from jobs.credentials import hidden


class InputError(Exception):
    """What the user gave cannot be used: said in one message, exit code 2.

    path: where the value stands (`layout.tp`, a file, a run id); value: what was given; rule: what it
    must satisfy, with the numbers; nearest: a valid choice, if one can be named. Credentials in a URL are not shown.
    """

    def __init__(self, path: str, value: object, rule: str, nearest: object = None) -> None:
        path, rule, value = hidden(path), hidden(rule), hidden(value) if isinstance(value, str) else value
        self.path, self.value, self.rule, self.nearest = path, value, rule, nearest
        shown = path if value is None else f"{path}={value}"
        hint = "" if nearest is None else f"; nearest valid: {nearest}"
        super().__init__(f"{shown}: {rule}{hint}")


class CombinedInputError(InputError):
    """Several of them at once, so that nobody mends a spec one message at a time."""

    def __init__(self, errors: Iterable[InputError]) -> None:
        self.errors = list(errors)
        first = self.errors[0]
        super().__init__(first.path, first.value, first.rule, first.nearest)
        self.args = ("\n".join(str(error) for error in self.errors),)


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice spelled most like `word`, or None where none is near."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None
