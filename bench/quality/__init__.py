"""Does it learn: every variant beside PEFT's methods."""
