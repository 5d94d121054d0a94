"""The outer search over hyper-parameters."""
