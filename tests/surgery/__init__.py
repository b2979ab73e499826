"""Tests of surgery/."""
