"""Benchmarks: `python -m bench NAME [--device cpu] [--json FILE]`. Each gates on correctness before it times."""
