"""Programs that measure peft-composition beside its peers; `python -m benchmarks --help` says how to run them."""
