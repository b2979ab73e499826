"""Helpers that know nothing of adapters: files, fingerprints, determinism, progress."""
