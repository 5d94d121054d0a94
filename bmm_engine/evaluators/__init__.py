"""Score a live model on a task. Nothing is imported here: what reads scores does without torch."""
