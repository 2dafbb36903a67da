"""Strategies: schedules, traffic, cost and plans, in pure Python without jax."""
