"""Merges in memory and on disk: inputs lined up, planned, solved module by module, written."""
