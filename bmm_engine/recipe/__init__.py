"""The YAML of a merge as validated types; mergekit's files are translated into it."""
