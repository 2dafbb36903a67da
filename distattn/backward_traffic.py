"""What the backward pass of a combine makes the busiest device send, by formula."""

import dataclasses

from distattn import cost
from distattn.cost import Shape, Topology, Traffic
from distattn.traffic import QUERY_SHARDED, gather_traffic, sum_traffic, traffic


def backward_traffic(combine: str, shape: Shape, topology: Topology) -> Traffic:
    """What the backward pass of a combine exchanges: what the forward pass gathered, and gradients of it.

    The gradient of a whole query is summed over the devices; those of keys and values stay where they
    are, or go back by the way that these came, in float32.
    """
    if topology.size == 1:
        return Traffic()
    wide = dataclasses.replace(shape, itemsize=max(4, shape.itemsize))
    if combine not in QUERY_SHARDED:
        names = ("psum", "butterfly")
        sums = [sum_traffic(name, wide.query_bytes, topology) for name in names]
        return min(sums, key=lambda x: cost.time_s(x, topology))
    if combine == "reduce_scatter":
        rows = shape.query_bytes + wide.out_bytes  # queries, and cotangents of their results
        return gather_traffic(rows, topology) + gather_traffic(wide.query_bytes, topology)
    return traffic(combine, shape, topology) + traffic(combine, wide, topology)
