"""What the benchmarks are made of: `bench_step.py` and `bench_zero.py` beside this folder are their commands."""
