"""Merge quality on real tasks: experts are fine-tuned, merged in every way, and scored; `python -m bench accuracy`."""
