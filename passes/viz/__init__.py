"""Diagrams of sites."""
