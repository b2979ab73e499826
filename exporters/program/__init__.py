"""Exported programs with a live coefficient, and swapping their cores."""
