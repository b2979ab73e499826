"""Small benchmarks of one layer or one factorisation."""
