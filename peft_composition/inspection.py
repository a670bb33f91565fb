"""Another import path of `analysis.inspection.inspect_adapters`."""

from .analysis.inspection import AdapterReport, inspect_adapters


__all__ = ["AdapterReport", "inspect_adapters"]
