"""`inspect_adapters` where users look for it; it lives in `analysis.inspection`."""

from .analysis.inspection import AdapterReport, inspect_adapters


__all__ = ["AdapterReport", "inspect_adapters"]
