"""distattn as the attention of `jax_nn`, `flax` and `equinox`: each module imports its own framework only."""
