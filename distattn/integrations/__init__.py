"""Attention for callers of jax.nn, Flax and Equinox; each module imports one framework."""
