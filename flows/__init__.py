"""The entry points: presets, the command line, and the Prefect flow. Thin; the work is in `pipeline`."""
