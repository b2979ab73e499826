"""What each variant costs on a model of one's own: ``surgery cost``."""
