"""Merge Hugging Face checkpoints, shard by shard."""
