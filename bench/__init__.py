"""Benchmarks: `python -m bench NAME... [--device cpu|cuda] [--json FILE]`. Each gates on correctness before it times."""
