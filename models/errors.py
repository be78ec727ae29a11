"""The error that the user of a network can mend; any other exception is a fault of ours."""

from __future__ import annotations


class ModelError(ValueError):
    """A network, or its weights, that cannot be built or loaded as configured; one line that names thing and cure."""
