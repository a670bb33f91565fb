"""What `benchmarks.gpu_check` runs on a GPU: checks against float64, timings, memory, synchronisations."""
