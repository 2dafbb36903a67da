"""A language model on a `distattn.KVCache`, for the examples 06, 07, 09 and 10.

`llama` is the model, `layers` its layers beside attention, and `smollm2` loads pretrained weights.
`generation` answers many requests at once, and `sampling` chooses the tokens.
"""
