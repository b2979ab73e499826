"""Representation: node provenance, names, module utilities, adapter traces."""
