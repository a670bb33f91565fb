"""Compares adapters with what needs none, on the same examples and budget, with a verdict and its uncertainty."""
