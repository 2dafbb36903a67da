"""What one device exchanges with the others inside `shard_map`."""
