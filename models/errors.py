"""What the user of a network can mend is a type of its own; any other exception is a fault of ours."""

from __future__ import annotations


class ModelError(ValueError):
    """A network, or weights for it, that cannot be had as asked for: one line that names the thing and the cure."""
