"""The command `distattn check`."""
