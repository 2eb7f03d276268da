"""The benchmarks: `fastopt bench step`, `zero` and `checkpoint`, or `python -m fastopt.bench.step` and so on.

They use every part of the library, and no part uses them. Their options are read with argparse and their tables are
plain text, so that they run from a checkout on a machine that has torch and little else.
"""
