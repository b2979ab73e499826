"""Helpers that know nothing of adapters: files, determinism, progress."""
