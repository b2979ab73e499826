"""The demo: ``surgery demo``."""
