"""distattn in models and frameworks that others made: a module imports what it is for, and no other does.

`smollm2` is a language model whose attention is one call to a `KVCache`, `sampling` chooses tokens from
logits, and `generation` runs many requests at once on one cache: what `distattn generate` is made of.
`drafts` guesses what comes next; `plain` and `exact` are what a llama computes beside attention.
`flax`, `equinox` and `jax_nn` put distattn where models of these frameworks have their attention.
"""
