"""The pass contract, the pass manager, the dialect, translation validation."""
