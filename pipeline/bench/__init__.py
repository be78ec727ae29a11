"""The speed benchmarks of `zs-seg bench NAME`: ours and a reference, alternated in one process."""
