"""The property by which a test tells how many faults it put in, all of them survived."""

from __future__ import annotations

POINTS = "fault points"
