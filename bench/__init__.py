"""Benchmark ingredients that every machine with Python can rebuild: text, and a small trained model."""
