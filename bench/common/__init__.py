"""What all benchmarks share: timing, memory, provenance of a run, stores of results, models and texts to load."""
