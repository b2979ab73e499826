"""How adapters meet a model, and what an operated model remembers."""
