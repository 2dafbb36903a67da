"""The strategy of a call: the axes over which arrays move, by name or by predicted cost."""

import dataclasses
import math
from typing import Any

import jax

from distattn.attention.ring import Ring
from distattn.attention.sharding import Placement
from distattn.collectives.all_reduce import BY_NAME
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.reproducible import ReproducibleBlocks
from distattn.local.tiling import Machine
from distattn.planning import cost
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
# If it is not known how query and result are sharded: 256 queries on 2 x 4 and
# 4 x 2 processes and devices (Gloo) took 1.06 to 1.14 times as long for 0.8 of the predicted time.
CLEARLY = 0.7


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Axes of the mesh over which arrays move before, during and after each device computes."""

    gather_rows: Axes = ()  # query, and what has its rows, is gathered along T
    gather_keys: Axes = ()  # keys and values are gathered along S
    ring: Axes = ()  # keys and values travel round these devices, and queries stay
    heads: Axes = ()  # shard T and S outside, and heads inside
    all_reduce: Axes = ()  # states are merged, and are whole on all devices
    scatter: Axes = ()  # states are merged, and scattered along T
    schedule: StrategyLike = "auto"  # for the all-reduce
    # "T" (query and result) and "S", if whole outside although axes shard them inside
    whole: str = ""

    @property
    def gathers(self) -> tuple[Axes, Axes]:
        """Axes over which T, and keys and values, have to be gathered."""
        rows, keys = self.gather_rows, self.gather_keys
        return () if "T" in self.whole else rows, () if "S" in self.whole else keys


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything about a call that is not an array."""

    placement: Placement
    strategy: Strategy
    logit_config: LogitConfig
    implementation: str
    reproducible_blocks: ReproducibleBlocks | None = None

    @property
    def machine(self) -> Machine:
        """Platform on which the call runs."""
        return Machine(self.placement.platform, self.placement.compiler_sharded)

    @property
    def key_axes(self) -> Axes:
        """Axes of S in the inner sharding, in the order of its shards."""
        moved = self.strategy.gather_keys + self.strategy.heads
        return tuple(axis for axis in self.placement.key if axis not in moved)

    @property
    def row_axes(self) -> Axes:
        """Axes of T in the inner sharding."""
        moved = self.strategy.gather_rows + self.strategy.heads
        return tuple(axis for axis in self.placement.query if axis not in moved)

    @property
    def ring(self) -> Ring | None:
        """Devices round which keys travel."""
        return Ring(self.strategy.ring, self.key_axes) if self.strategy.ring else None


def check_strategy(strategy: StrategyLike) -> None:
    """Raise ValueError if the strategy does not exist."""
    if isinstance(strategy, Schedule):
        return
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy is {strategy!r}; it must be one of {STRATEGIES} or a distattn.Schedule"
        )


def check_exchange(placement: Placement, strategy: StrategyLike) -> None:
    """Raise ValueError if a strategy is named and key is sharded over no axis, as far as is known."""
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


def choose_strategy(
    placement: Placement,
    inputs: AttentionInputs,
    strategy: StrategyLike,
    reproducible_blocks: ReproducibleBlocks | None = None,
) -> tuple[Placement, Strategy]:
    """Return the strategy of a global call, and the placement, with T sharded if the strategy needs that.

    Args:
      placement: axes that shard the arrays.
      inputs: global shapes.
      strategy: as in `dot_product_attention`.
      reproducible_blocks: of a reproducible call.

    Raises:
      ValueError: a strategy that does not fit the sharding of query, or heads that do not divide.
    """
    devices, cuts_rows = placement.size(placement.key), False
    if devices > 1 and placement.sized(placement.query) == placement.sized(placement.key):
        placement = dataclasses.replace(placement, query=placement.key)
    shared = tuple(axis for axis in placement.query if axis in placement.key)
    if isinstance(strategy, Schedule) and strategy.size != devices:
        raise ValueError(
            f"strategy is a Schedule for {strategy.size} devices, but the keys are on {devices} (axes "
            f"{placement.key}); build it for {devices}"
        )
    if devices == 1:
        # Rows may still be sharded over an axis of the keys that has one device: nothing to move.
        return placement, Strategy(gather_keys=placement.key)
    if strategy == "auto":
        strategy = _by_cost(placement, inputs, shared, reproducible_blocks)
        cuts_rows = strategy in QUERY_SHARDED and not shared and placement.query_known
    if strategy not in QUERY_SHARDED:
        return placement, Strategy(gather_rows=shared, all_reduce=placement.key, schedule=strategy)
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
    chosen = strategy_of(strategy, shared, sizes, heads)
    return placement, dataclasses.replace(chosen, whole="T" if cuts_rows else "")


def strategy_of(name: str, shared: Axes, sizes: dict[str, int], heads: int) -> Strategy:
    """Return the strategy of that name for a sharded query.

    Args:
      name: one of `QUERY_SHARDED`.
      shared: the axes that shard T and S.
      sizes: of the axes of S, in the order of its shards.
      heads: N on each device.

    Raises:
      ValueError: no two levels, or heads that do not divide.
    """
    rest = tuple(axis for axis in sizes if axis not in shared)
    if name == "reduce_scatter":
        return Strategy(gather_rows=shared, scatter=shared, all_reduce=rest)
    if name == "gather_kv":
        return Strategy(gather_keys=shared, all_reduce=rest)
    if name == "ring":
        return Strategy(ring=shared, all_reduce=rest)
    way = name.removeprefix("ulysses").removeprefix("_")
    if way and len(sizes) < 2:
        raise ValueError(
            f"strategy={name!r} needs two levels, a tuple of axes with the fast one last, and the keys "
            f"are on {shared}; on one axis use 'ulysses' or {way!r}"
        )
    inner = shared[-1:] if way else shared
    outer = tuple(axis for axis in shared if axis not in inner)
    size = math.prod(sizes[axis] for axis in inner)
    if heads % size:
        raise ValueError(
            f"strategy={name!r} shards the heads of query over the {size} devices of {inner}, and there "
            f"are {heads} on each device, no multiple of {size}; use 'ring' or 'gather_kv', which "
            "leave heads where they are, or axes on which the heads divide"
        )
    if math.prod(sizes[axis] for axis in outer) == 1:
        return Strategy(heads=inner)
    if way == "ring":
        return Strategy(heads=inner, ring=outer)
    return Strategy(heads=inner, gather_keys=outer)


def choose_sharded(
    shape: Workload, topology: Topology, sizes: tuple[int, ...], *, all_keys: bool = False
) -> cost.Choice:
    """Choose the cheapest strategy for a sharded query.

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
    return cost.choose(shape, topology, query_sharded=True, candidates=names)


def _by_cost(
    placement: Placement,
    inputs: AttentionInputs,
    shared: Axes,
    reproducible_blocks: ReproducibleBlocks | None,
) -> str:
    shape = _sizes_of_group(placement, inputs)
    topology = placement.topology(placement.key)
    devices = placement.size(placement.key)
    same = not placement.query or placement.query == placement.key
    sizes = tuple(placement.size((axis,)) for axis in placement.key) if same else ()
    rows = inputs.query.shape[1]
    if reproducible_blocks is not None:
        shape = dataclasses.replace(shape, words=reproducible_blocks.by_keys.count)
    if shared:
        return choose_sharded(shape, topology, sizes).strategy
    choice = cost.choose(shape, topology, query_sharded=False)
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


def _sizes_of_group(placement: Placement, inputs: AttentionInputs) -> Workload:
    """Return the sizes on one group of devices along the axes of the keys."""
    head_shards = placement.size(placement.heads)
    extra = tuple(axis for axis in placement.query if axis not in placement.key)
    # In index order the last device works as without a mask; in another order, all work alike.
    causal = inputs.mask.is_causal and inputs.mask.index_order is None
    sizes = sizes_of_call(inputs.query, inputs.key, inputs.value, causal=causal)
    return dataclasses.replace(
        sizes,
        batch=max(sizes.batch // placement.size(placement.batch), 1),
        query_length=max(sizes.query_length // placement.size(extra), 1),
        num_heads=sizes.num_heads // head_shards,
        num_kv_heads=max(sizes.num_kv_heads // head_shards, 1),
    )


def sizes_of_call(query: Any, key: Any, value: Any, *, causal: bool) -> Workload:
    """Return the sizes of a call from query [B, T, N, H], key [.., S, K, H] and value [.., S, K, V]."""
    batch, rows, heads, width = query.shape
    keys, kv_heads, value_width = value.shape[-3:]
    return Workload(
        batch=batch,
        query_length=rows,
        key_length=keys,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        value_dim=value_width,
        itemsize=key.dtype.itemsize,
        causal=causal,
    )
