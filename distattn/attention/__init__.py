"""The public calls: where arrays are stored, what moves, and what one device does."""
