"""From maps to numbers."""
