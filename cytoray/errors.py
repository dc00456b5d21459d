"""The errors a user meets: bad input (exit code 2) and bad slides (quarantined)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where and how to mend it.

    The command line prints the message without a traceback and exits with code 2.

    Attributes:
        problems: every problem found, one sentence each.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        lines = [message, *(f"  - {problem}" for problem in self.problems)]
        super().__init__("\n".join(lines))

    def __reduce__(self):
        return (_rebuild_input_error, (str(self), self.problems))


def _rebuild_input_error(text: str, problems: list[str]) -> InputError:
    error = InputError(text.split("\n", 1)[0], problems)
    return error


def raise_problems(message: str, problems: Sequence[str], *, limit: int = 50) -> None:
    """Raise one `InputError` that lists all of `problems`; do nothing when there is none."""
    if not problems:
        return
    shown = list(problems[:limit])
    if len(problems) > limit:
        shown.append(f"... and {len(problems) - limit} more")
    raise InputError(message, shown)


def choose(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return `name` if it is one of `valid`, else raise an `InputError` that lists them."""
    names = sorted(valid)
    if name not in names:
        raise InputError(f"unknown {kind} {name!r}; valid: {', '.join(names)}")
    return name


class SlideError(Exception):
    """A slide (or a region of one) that cannot be used: it is quarantined, never skipped silently.

    Args:
        code: a short reason code, e.g. `not_a_slide`, `decode_error`, `mpp_missing`.
        message: one sentence for a person.
        region: which part of the slide, e.g. a tile id; empty for the whole slide.
    """

    def __init__(self, code: str, message: str, region: str = "") -> None:
        super().__init__(code, message, region)
        self.code = code
        self.message = message
        self.region = region

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


def reason_code(text: str) -> str:
    """The reason code at the end of a `SlideError` that was made a string; else `decode_error`."""
    message, _, code = text.rpartition(" [")
    known = message and code.endswith("]") and code[:-1].isidentifier()
    return code[:-1] if known else "decode_error"
