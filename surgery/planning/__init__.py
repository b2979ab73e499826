"""Choose sites, collect statistics, build adapters before the model is modified."""
