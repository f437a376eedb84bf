"""Reports made from files: of a training run (run.py), and of benchmark results (bench.py)."""
