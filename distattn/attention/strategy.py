"""What moves between devices in one call: chosen by name, or by the planner."""

import dataclasses
import math

import jax

from distattn.attention.sharding import Placement
from distattn.collectives.all_reduce import BY_NAME
from distattn.local.inputs import AttentionInputs
from distattn.local.reproducible import ReproducibleBlocks
from distattn.planning import cost
from distattn.planning import cost as planner
from distattn.planning.cost import (
    HEADS_SHARDED,
    TWO_LEVELS,
    Topology,
    Workload,
    fits,
    gather_traffic,
)
from distattn.planning.cost import QUERY_SHARDED as SHARDED_FORMULAS
from distattn.planning.plan import Axes
from distattn.planning.schedule import Schedule

QUERY_SHARDED = tuple(SHARDED_FORMULAS)
STRATEGIES = ("auto", *BY_NAME, *QUERY_SHARDED)
StrategyLike = str | Schedule
# Where it is not known whether the query is sharded, nor how the result is wanted: 256 queries on 2 x 4 and
# 4 x 2 processes and devices (Gloo) took 1.06 to 1.14 times as long for 0.8 of the predicted time.
CLEARLY = 0.7


@dataclasses.dataclass(frozen=True)
class Movement:
    """What moves before, during and after the local part."""

    gather_rows: Axes = ()  # of T: the query (and all that goes by its rows) is gathered over these
    gather_keys: Axes = ()  # of S: keys and values are gathered over these
    ring: Axes = ()  # of T and S: keys and values travel round these, and rows stay
    heads: Axes = ()  # of T and S: while devices compute, these shard heads instead
    all_reduce: Axes = ()  # states are merged over these, and stay whole
    scatter: Axes = ()  # states are merged over these, and scattered along T
    schedule: StrategyLike = "auto"  # of the all-reduce
    # Of "T" (of query and result) and "S" what is whole at rest, though axes shard it: cut for the work, or
    # not to be gathered.
    whole: str = ""

    @property
    def gathers(self) -> tuple[Axes, Axes]:
        """The axes over which what goes by T, and keys and values, have to be gathered."""
        rows, keys = self.gather_rows, self.gather_keys
        return () if "T" in self.whole else rows, () if "S" in self.whole else keys

    def keys_at_work(self, axes: Axes) -> Axes:
        """Of the axes of S those that shard it while devices compute."""
        return tuple(axis for axis in axes if axis not in self.gather_keys + self.heads)


def check_strategy(strategy: StrategyLike) -> None:
    """That the strategy exists."""
    if isinstance(strategy, Schedule):
        return
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy is {strategy!r}; it must be one of {STRATEGIES} or a distattn.Schedule"
        )


def check_exchange(placement: Placement, strategy: StrategyLike) -> None:
    """That a strategy that is named has devices to strategy.

    Raises:
      ValueError: key is sharded over no axis, or it is not known over which.
    """
    if strategy == "auto" or placement.key:
        return
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    if manual:
        remedy = (
            f"the call is inside a shard_map over {manual}, and sees what one device has: call "
            "distattn.sharded_attention there, with axis_name"
        )
    elif placement.compiler_sharded:
        remedy = (
            "how key is sharded along S can't be read here, inside jit and under Auto axes: pass "
            "key_value_sharding"
        )
    else:
        remedy = (
            "key is sharded along S over no axis: pass key_value_sharding, or sharded arrays, or "
            "strategy='auto'"
        )
    raise ValueError(
        f"strategy={strategy!r} says how the devices of the keys exchange, and {remedy}"
    )


def choose_movement(
    placement: Placement,
    inputs: AttentionInputs,
    strategy: StrategyLike,
    reproducible_blocks: ReproducibleBlocks | None = None,
) -> tuple[Placement, Movement]:
    """The movement of a call, and the placement with T sharded where the movement needs that.

    Args:
      placement: where the arrays lie.
      inputs: global shapes.
      strategy: as in `dot_product_attention`.
      reproducible_blocks: of a reproducible call.

    Returns:
      Placement and Movement.

    Raises:
      ValueError: a strategy that does not fit where the query lies, or heads that do not divide.
    """
    devices, cuts_rows = placement.size(placement.key), False
    if devices > 1 and placement.sized(placement.query) == placement.sized(placement.key):
        placement = dataclasses.replace(placement, query=placement.key)
    shared = tuple(axis for axis in placement.query if axis in placement.key)
    if isinstance(strategy, Schedule) and strategy.size != devices:
        raise ValueError(
            f"strategy is a Schedule for {strategy.size} devices, but the keys lie on {devices} (axes "
            f"{placement.key}); build it for {devices}"
        )
    if devices == 1:
        # Rows may still be sharded over an axis of the keys that has one device: nothing to move.
        return placement, Movement(gather_keys=placement.key)
    if strategy == "auto":
        strategy = _by_cost(placement, inputs, shared, reproducible_blocks)
        cuts_rows = strategy in QUERY_SHARDED and not shared and placement.query_known
    if strategy not in QUERY_SHARDED:
        movement = Movement(gather_rows=shared, all_reduce=placement.key, schedule=strategy)
        return placement, movement
    if not shared:
        if placement.query_given and not cuts_rows:
            raise ValueError(
                f"strategy={strategy!r} needs a query that is sharded along T over {placement.key}, and "
                f"query_sharding shards T over {placement.query}; shard T over {placement.key}, leave "
                "query_sharding None, or use 'butterfly', 'psum', 'all_gather' or 'fused'"
            )
        placement = dataclasses.replace(placement, query=placement.query + placement.key)
        shared = placement.key
    if strategy in HEADS_SHARDED and placement.query != placement.key:
        raise ValueError(
            f"strategy={strategy!r} needs query and keys sharded over the same axes, and T is sharded over "
            f"{placement.query}, S over {placement.key}; use 'ring', 'gather_kv' or 'reduce_scatter'"
        )
    sizes = {axis: placement.size((axis,)) for axis in placement.key}
    heads = inputs.query.shape[2] // placement.size(placement.heads)
    movement = movement_of(strategy, shared, sizes, heads)
    return placement, dataclasses.replace(movement, whole="T" if cuts_rows else "")


def movement_of(strategy: str, shared: Axes, sizes: dict[str, int], heads: int) -> Movement:
    """The movement of a strategy for a sharded query, by its name.

    Args:
      strategy: one of `QUERY_SHARDED`.
      shared: the axes that shard T and S.
      sizes: of the axes of S, in the order of its shards.
      heads: N on each device.

    Raises:
      ValueError: no two levels, or heads that do not divide.
    """
    rest = tuple(axis for axis in sizes if axis not in shared)
    if strategy == "reduce_scatter":
        return Movement(gather_rows=shared, scatter=shared, all_reduce=rest)
    if strategy == "gather_kv":
        return Movement(gather_keys=shared, all_reduce=rest)
    if strategy == "ring":
        return Movement(ring=shared, all_reduce=rest)
    way = strategy.removeprefix("ulysses").removeprefix("_")
    if way and len(sizes) < 2:
        raise ValueError(
            f"strategy={strategy!r} needs two levels, a tuple of axes with the fast one last, and the keys "
            f"lie on {shared}; on one axis use 'ulysses' or {way!r}"
        )
    inner = shared[-1:] if way else shared
    outer = tuple(axis for axis in shared if axis not in inner)
    size = math.prod(sizes[axis] for axis in inner)
    if heads % size:
        raise ValueError(
            f"strategy={strategy!r} shards the heads of query over the {size} devices of {inner}, and there "
            f"are {heads} on each device, no multiple of {size}; use 'ring' or 'gather_kv', which "
            "leave heads where they are, or axes on which the heads divide"
        )
    if math.prod(sizes[axis] for axis in outer) == 1:
        return Movement(heads=inner)
    if way == "ring":
        return Movement(heads=inner, ring=outer)
    return Movement(heads=inner, gather_keys=outer)


def choose_sharded(
    shape: Workload, topology: Topology, sizes: tuple[int, ...], *, all_keys: bool = False
) -> planner.Choice:
    """The cheapest strategy for a sharded query.

    Args:
      shape: sizes over all devices.
      topology: the devices, in the order of the mesh.
      sizes: the same, in the order of the shards of S; () where T and S are sharded differently.
      all_keys: whether a bias or mask has been cut for those that bring all keys to a row.
    """
    excluded = ("reduce_scatter",) if all_keys else ()
    if not sizes:
        excluded += HEADS_SHARDED
    elif sizes != topology.sizes:  # the fast axis is not where the heads would go
        excluded += TWO_LEVELS
    names = [x for x in QUERY_SHARDED if x not in excluded and fits(x, shape, topology)]
    return planner.choose(shape, topology, query_sharded=True, candidates=names)


def _by_cost(
    placement: Placement,
    inputs: AttentionInputs,
    shared: Axes,
    reproducible_blocks: ReproducibleBlocks | None,
) -> str:
    shape = _shape(placement, inputs)
    topology = placement.topology(placement.key)
    devices = placement.size(placement.key)
    same = not placement.query or placement.query == placement.key
    sizes = tuple(placement.size((axis,)) for axis in placement.key) if same else ()
    rows = inputs.query.shape[1]
    if reproducible_blocks is not None:
        shape = dataclasses.replace(shape, words=reproducible_blocks.by_keys.words)
    if shared:
        return choose_sharded(shape, topology, sizes).strategy
    choice = planner.choose(shape, topology, query_sharded=False)
    if placement.query or rows % devices:
        return choice.strategy
    if placement.query_known:
        # Large states in fixed point take longer than keys, values and results together. In a cache keys
        # stay, and rows that are padded to blocks on each device would be work for nothing.
        if (
            reproducible_blocks is None
            or reproducible_blocks.keys == 1
            or rows % (devices * reproducible_blocks.rows)
        ):
            return choice.strategy
        other, least = choose_sharded(shape, topology, sizes), 1.0
        results_s = cost.time_s(gather_traffic(shape.out_bytes, topology), topology)
    else:
        # The layout is not known, so it may as well count as sharded where that is clearly cheaper.
        other, least, results_s = choose_sharded(shape, topology, sizes), CLEARLY, 0.0
    return (
        other if other.predicted_s + results_s < least * choice.predicted_s else choice
    ).strategy


def _shape(placement: Placement, inputs: AttentionInputs) -> Workload:
    """Sizes on one group of devices along the axes of the keys."""
    batch, rows, heads, width = inputs.query.shape
    keys, kv_heads, value_width = inputs.value.shape[-3:]
    head_shards = placement.size(placement.heads)
    extra = tuple(axis for axis in placement.query if axis not in placement.key)
    return Workload(
        batch=max(batch // placement.size(placement.batch), 1),
        query_length=max(rows // placement.size(extra), 1),
        key_length=keys,
        num_heads=heads // head_shards,
        num_kv_heads=max(kv_heads // head_shards, 1),
        head_dim=width,
        value_dim=value_width,
        itemsize=inputs.key.dtype.itemsize,
        # In index order the last device works as without a mask; in one of the caller's, all work alike.
        causal=inputs.mask.is_causal and inputs.mask.index_order is None,
    )
