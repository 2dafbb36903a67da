"""The command `distattn check`: its arguments, its runner, its text."""
