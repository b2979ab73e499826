"""Contracts that every registered part goes through."""
