"""A recipe from end to end: what it measures, merges, inspects, samples, and the tasks that judge it."""
