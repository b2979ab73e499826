"""The modules of an operated model: factors, cores, adapters."""
