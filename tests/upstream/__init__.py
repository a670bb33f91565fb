"""Tests of reading adapters."""
