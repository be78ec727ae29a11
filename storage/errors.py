"""The error that the user can mend; any other exception is a fault of ours and keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Where a file is missing, or is none. Any other OSError (of the disk, the network, the rights, the number of open files) is
# no sign of damage: it passes, and nothing is made again or set aside for it.
NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class UserError(ValueError):
    """A mistake that the user can mend, as one line that names the thing and the cure.

    The command line prints the line and exits with status 2; the Prefect flow fails the task without another try.
    """


def anew(key: str = "") -> str:
    """What mends the damaged artefact of that key, "" = whichever it is, at no cost of what was made of it."""
    command, what = (f"verify {key}", "it") if key else ("verify", "what is damaged")
    return f"`zs-seg {command} --set-aside` sets {what} aside, and the next run makes it anew"


def counted(number: int, noun: str) -> str:
    """Such as "1 artefact" and "2,000 artefacts"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known word that is closest to this one, as " (did you mean 'x'?)"; "" where none is close."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
