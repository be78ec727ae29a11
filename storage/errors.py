"""What the user can mend is a type of its own; any other exception is a fault of ours and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend, as one line that names the thing and the cure.

    The command line prints the line and exits with status 2; the Prefect flow fails the task without another try.
    """
