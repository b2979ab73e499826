"""Capture models as graphs, and inspect them."""
