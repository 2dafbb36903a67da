"""A language model on a `distattn.KVCache`, for the examples 06, 07, 09 and 10.

`llama` is the model and `layers` its layers beside attention. `smollm2` reads pretrained weights, which
`pretrained` loads for the examples, and `small_llama` has random ones. `generation` answers many requests
at once, and `sampling` chooses the tokens. `plain_cache` is the cache that results are compared with.
"""
