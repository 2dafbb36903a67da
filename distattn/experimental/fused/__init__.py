"""The exchange of states inside one TPU kernel."""
