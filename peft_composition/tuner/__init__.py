"""The PEFT tuner that mixes adapters: formulas in `functional`, layers in `layer`, the tuner in `model`."""
