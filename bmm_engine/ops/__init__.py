"""The engine's numerical operations: one folder each, one file per backend, `reference.py` the specification."""
