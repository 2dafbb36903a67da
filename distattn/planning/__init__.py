"""What a strategy sends and what that costs, in pure Python without jax."""
