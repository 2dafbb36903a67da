"""Whether attention is right on the devices at hand, and how fast they exchange; without printing.

Every process of a job calls the same functions in the same order, and learns what all have found.
"""
