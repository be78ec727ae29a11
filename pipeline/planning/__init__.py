"""Estimates of a run's size and time before it starts."""
