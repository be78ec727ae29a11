"""What people start: presets, the command line, and the Prefect flow. Thin; the work is in `pipeline`."""
