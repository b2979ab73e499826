"""Tables, figures and pages from everything that is recorded."""
