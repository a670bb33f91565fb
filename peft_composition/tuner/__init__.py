"""Mixes: the PEFT tuner. The formulas are in `functional`, the modules in `layer`, the whole in `model`."""
