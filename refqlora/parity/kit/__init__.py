"""The kit: other people's kernels examined, and their mistakes named."""
