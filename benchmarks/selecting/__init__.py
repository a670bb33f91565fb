"""Choosing among hundreds of candidates, measured: how good each selector's pick is, and what it costs."""
