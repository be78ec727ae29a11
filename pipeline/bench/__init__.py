"""The benchmarks behind `zs-seg bench NAME`: ours and a reference, in turn, in one process."""
