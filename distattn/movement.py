"""What moves between devices in one call: chosen by name, or by the planner."""

import dataclasses

from distattn import planner
from distattn.collectives import ALL_REDUCES
from distattn.cost import Shape
from distattn.operands import Operands
from distattn.placement import Axes, Placement
from distattn.schedule import Schedule

QUERY_SHARDED = ("reduce_scatter", "gather_kv")
COMBINES = ("auto", *ALL_REDUCES, *QUERY_SHARDED, "ring")
Combine = str | Schedule


@dataclasses.dataclass(frozen=True)
class Movement:
    """What is gathered before the local part, and how states are merged after it."""

    gather_rows: Axes = ()  # of T: the query (and all that goes by its rows) is gathered over these
    gather_keys: Axes = ()  # of S: keys and values are gathered over these
    all_reduce: Axes = ()  # states are merged over these, and stay whole
    scatter: Axes = ()  # states are merged over these, and scattered along T
    schedule: Combine = "auto"  # of the all-reduce


def check_combine(combine: Combine, reproducible: bool) -> None:
    """That the combine exists, and that what is asked for is built."""
    if reproducible:
        raise NotImplementedError("reproducible=True is not built; pass reproducible=False")
    if isinstance(combine, Schedule):
        return
    if combine not in COMBINES:
        raise ValueError(
            f"combine is {combine!r}; it must be one of {COMBINES} or a distattn.Schedule"
        )


def choose_movement(
    placement: Placement, operands: Operands, combine: Combine, query_axis_name: object
) -> tuple[Placement, Movement]:
    """The movement of a call, and the placement with T sharded where the movement needs that.

    Args:
      placement: where the arrays lie.
      operands: global shapes.
      combine: as in `dot_product_attention`.
      query_axis_name: as passed by the caller.

    Returns:
      Placement and Movement.

    Raises:
      ValueError: a combine that does not fit where the query lies.
      NotImplementedError: combine='ring'.
    """
    shared = tuple(axis for axis in placement.query if axis in placement.key)
    devices = placement.size(placement.key)
    if combine == "ring":
        if not shared:
            raise ValueError(
                "combine='ring' needs a query that is sharded along T over the axes of the keys, and "
                "this query is replicated; use 'butterfly', 'psum' or 'all_gather', or pass "
                "query_axis_name"
            )
        raise NotImplementedError(
            f"combine='ring' is not built; use one of {QUERY_SHARDED} for a sharded query"
        )
    if isinstance(combine, Schedule) and combine.size != devices:
        raise ValueError(
            f"combine is a Schedule for {combine.size} devices, but the keys lie on {devices} (axes "
            f"{placement.key}); build it for {devices}"
        )
    if devices == 1:
        # Rows may still be sharded over an axis of the keys that has one device: nothing to move.
        return placement, Movement(gather_keys=placement.key)
    if combine == "auto":
        combine = _by_cost(placement, operands, bool(shared))
    if combine not in QUERY_SHARDED:
        movement = Movement(gather_rows=shared, all_reduce=placement.key, schedule=combine)
        return placement, movement
    if not shared:
        if query_axis_name != "auto":
            raise ValueError(
                f"combine={combine!r} needs a query that is sharded along T over {placement.key}, and "
                f"query_axis_name is {query_axis_name!r}; pass query_axis_name={placement.key} or 'auto'"
            )
        placement = dataclasses.replace(placement, query=placement.query + placement.key)
        shared = placement.key
    rest = tuple(axis for axis in placement.key if axis not in shared)
    if combine == "gather_kv":
        return placement, Movement(gather_keys=shared, all_reduce=rest)
    return placement, Movement(gather_rows=shared, scatter=shared, all_reduce=rest)


def _by_cost(placement: Placement, operands: Operands, query_sharded: bool) -> str:
    shape = _shape(placement, operands)
    topology = placement.topology(placement.key)
    devices = placement.size(placement.key)
    choice = planner.choose(shape, topology, query_sharded=query_sharded)
    rows = operands.query.shape[1]
    if query_sharded or placement.query_known or placement.query or rows % devices:
        return choice.combine
    # The query's layout is not known, so it may as well count as sharded where that is cheaper.
    other = planner.choose(shape, topology, query_sharded=True)
    return min(choice, other, key=lambda c: c.predicted_s).combine


def _shape(placement: Placement, operands: Operands) -> Shape:
    """Sizes on one group of devices along the axes of the keys."""
    batch, rows, heads, width = operands.query.shape
    keys, kv_heads, value_width = operands.value.shape[-3:]
    head_shards = placement.size(placement.heads)
    extra = tuple(axis for axis in placement.query if axis not in placement.key)
    return Shape(
        batch=max(batch // placement.size(placement.batch), 1),
        query_length=max(rows // placement.size(extra), 1),
        key_length=keys,
        num_heads=heads // head_shards,
        num_kv_heads=max(kv_heads // head_shards, 1),
        head_dim=width,
        value_dim=value_width,
        itemsize=operands.key.dtype.itemsize,
    )
