"""Factorise weights: SVD, data-oriented factors, the statistics they need."""
