"""A byte-level transformer and its training run, for example 08.

`transformer` is the model, its text and a step of its training. `reproducible_layers` are its layers for
`--reproducible`. `options`, `checkpoints` and `report` are the command line, files and output of a run.
"""
