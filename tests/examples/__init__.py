"""Tests of the examples and the study."""
