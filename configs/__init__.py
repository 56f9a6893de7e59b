"""Experiments: one file each; `default.py` has every number once."""
