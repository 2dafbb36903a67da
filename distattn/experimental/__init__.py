"""Built, tested in the interpreter and compiled, but never timed."""
