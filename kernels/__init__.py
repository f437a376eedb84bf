"""Triton kernels, one file per operation; imported by `heptapod_fast.ops` when one is chosen."""
