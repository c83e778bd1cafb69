"""The kit: examine other people's kernels and name their mistakes."""
