"""Analyses of a graph: matrix products, weight views, linear sites."""
