"""GPU.md and PENDING.md, made from the files that bench/gpu.py writes.

Nothing is typed: figures come from gpu/*.json, gates from the benchmarks' own cases.
"""
