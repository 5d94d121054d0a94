"""The outer level: a search over hyper-parameters of a merge, on validation data."""
