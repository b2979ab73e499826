"""The console command ``surgery``."""
