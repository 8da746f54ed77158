"""Text to token ids and back, and the packed shards a trainer reads."""
