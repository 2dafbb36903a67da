"""Attention states that merge, without a mesh or a mask."""
