"""Read and write adapter files."""
