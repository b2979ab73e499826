"""How costs grow with rank, sites, tokens, width and the size of the graph."""
