"""Export formats, one file each, found without a list."""
