"""Communication of one device with the others inside `shard_map`."""
