"""Measures of a model on people's held-out turns."""
