"""Ring attention: keys travel, and no device holds more than two shards of them.

Everything here runs on one device, inside `shard_map`. Keys and values go round the devices with
their positions and segment ids, one hop at a time, D - 1 hops; the next shard is on its way while this
one is computed with. Back, the gradients of keys and values go round too, and come home in D - 1 hops
(Liu, Zaharia & Abbeel, "Ring Attention", arXiv 2310.01889). It differs from the published algorithm in:
1. masks are read from the positions that travel with a shard, so shards and the keys in them may be in
any order; 2. states are merged by the public `merge`; 3. a device's gradient of
its own keys does not travel, which saves a hop.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import vary, varying_axes
from distattn.algebra.mergeable import State, Sum, add, empty_like, monoid_of, zeros_at, zeros_like
from distattn.collectives.mesh import axes_size, mesh_order
from distattn.local.inputs import AttentionInputs
from distattn.local.mask import Span, take
from distattn.local.tiling import add_at, loop

# key, value, and int32[c, B|1, S] of what the mask reads of them (None: nothing)
Shard = tuple[jax.Array, jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices round which keys travel."""

    axes: tuple[str, ...]
    key_axes: tuple[str, ...]  # shard S, in the order of its shards; they include `axes`

    @property
    def in_order(self) -> tuple[str, ...]:
        """The axes in the order of the mesh, in which its devices are counted."""
        return mesh_order(self.axes)

    @property
    def size(self) -> int:
        """D, the number of devices."""
        return axes_size(self.axes)

    def send(self, x: Any) -> Any:
        """Send x to the next device, and return what the previous one sent."""
        pairs = [(rank, (rank + 1) % self.size) for rank in range(self.size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.in_order, pairs), x)

    def shard_number(self, hop: jax.Array | int) -> jax.Array:
        """Return the index of the shard of S that is here after `hop` hops."""
        source = (lax.axis_index(self.in_order) - hop) % self.size
        at = {}
        for axis in reversed(self.in_order):
            size = axes_size((axis,))
            at[axis], source = source % size, source // size
        number = jnp.int32(0)
        for axis in self.key_axes:
            index = at[axis] if axis in at else lax.axis_index(axis)
            number = number * axes_size((axis,)) + index
        return number


def ring_fold(
    local: Callable[[AttentionInputs], State], inputs: AttentionInputs, ring: Ring | None
) -> State:
    """Return the state of this device's queries over the keys of all devices of the ring.

    Args:
      local: the state over the keys of its inputs.
      inputs: this device's; bias and dense mask are for its rows and for all keys.
      ring: where the keys travel; None: they stay.

    Returns:
      The state of the kind that `local` gives, T the rows of this device.
    """
    if ring is None:
        return local(inputs)
    inputs = _typed(inputs, ring)
    state = empty_like(jax.eval_shape(local, inputs), varying_axes(inputs.query))

    def meet(hop: jax.Array | int, shard: Shard, state: State) -> State:
        return monoid_of(state).merge(state, local(_at_hop(inputs, shard, ring, hop)))

    def step(hop: jax.Array | int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        shard, state = carry
        coming = ring.send(shard)  # nothing below waits for it
        return coming, meet(hop, shard, state)

    shard = _shard(inputs)
    if ring.size > 1:
        shard, state = loop(ring.size - 1, step, (shard, state))
    return meet(ring.size - 1, shard, state)


def ring_gradients(
    gradients: Callable[[AttentionInputs], tuple[Sum, Sum, Sum, Sum | None]],
    inputs: AttentionInputs,
    ring: Ring | None,
) -> tuple[Sum, Sum, Sum, Sum | None]:
    """Return this device's gradients, those of keys and values summed over the ring.

    Args:
      gradients: as `local_gradients` makes it for this device's rows, of query, key, value and bias over
        the keys of its inputs; those of keys and values in the state's dtype.
      inputs: as in `ring_fold`.
      ring: as in `ring_fold`.

    Returns:
      d_query, d_key, d_value of this device's queries and keys, and d_bias, or None.
    """
    if ring is None:
        return gradients(inputs)
    inputs = _typed(inputs, ring)
    shard, axes = _shard(inputs), varying_axes(inputs.query)
    shapes = jax.eval_shape(lambda shard: gradients(_at_hop(inputs, shard, ring, 0)), shard)
    d_query, *none, d_bias = zeros_like(shapes, axes)
    if d_bias is not None:
        d_bias = zeros_at(d_bias, inputs.bias.shape, axes)

    def meet(hop: jax.Array | int, shard: Shard, d_query: Any, d_bias: Any) -> tuple[Any, ...]:
        more, d_key, d_value, d_block = gradients(_at_hop(inputs, shard, ring, hop))
        if d_bias is not None:
            spans = _columns(inputs.bias.shape, inputs.key, ring, hop)
            d_bias = add_at(d_bias, d_block, *spans)
        return add(d_query, more), d_bias, (d_key, d_value)

    # Hop 0 is the shard of this device, and with hop 1 the gradient of another's begins to travel.
    def start(hop: jax.Array | int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        shard, sums, _, at_home = carry
        coming = ring.send(shard)
        *sums, more = meet(hop, shard, *sums)
        return coming, tuple(sums), at_home, more

    def go_on(index: jax.Array | int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        shard, sums, on_its_way = carry
        coming, arriving = ring.send((shard, on_its_way))
        *sums, more = meet(index + 2, shard, *sums)
        return coming, tuple(sums), add(arriving, more)

    sums, none = (d_query, d_bias), tuple(none)
    starts = min(2, ring.size - 1)
    first, second = none, none
    if starts:
        shard, sums, first, second = loop(starts, start, (shard, sums, first, second))
    at_home, on_its_way = (first, second) if starts == 2 else (second, none)
    if ring.size > 3:
        shard, sums, on_its_way = loop(ring.size - 3, go_on, (shard, sums, on_its_way))
    if ring.size > 2:
        on_its_way = ring.send(on_its_way)
    *sums, more = meet(ring.size - 1, shard, *sums)
    d_keys = add(on_its_way, more)
    if ring.size > 1:
        d_keys = add(at_home, ring.send(d_keys))
    d_query, d_bias = sums
    return d_query, *d_keys, d_bias


def _typed(inputs: AttentionInputs, ring: Ring) -> AttentionInputs:
    """Type all inputs as varying over the ring and wherever one of them varies."""
    axes = varying_axes(lax.axis_index(ring.axes), *jax.tree.leaves(inputs))
    return jax.tree.map(lambda x: vary(x, axes), inputs)


def _shard(inputs: AttentionInputs) -> Shard:
    """Return the arrays that travel."""
    index = [getattr(inputs.mask, name) for name in _index_names(inputs)]
    return inputs.key, inputs.value, _stack(index) if index else None


def _index_names(inputs: AttentionInputs) -> list[str]:
    """Return the names of the arrays that a mask reads per key, without a dense mask."""
    names = ("key_positions", "key_segment_ids")
    return [name for name in names if getattr(inputs.mask, name) is not None]


def _stack(index: list[jax.Array]) -> jax.Array:
    shape = jnp.broadcast_shapes(*(x.shape for x in index))
    return jnp.stack([jnp.broadcast_to(x, shape) for x in index])


def _at_hop(
    inputs: AttentionInputs, shard: Shard, ring: Ring, hop: jax.Array | int
) -> AttentionInputs:
    """Return the inputs with the keys of the shard that is here."""
    key, value, index = shard
    mask = inputs.mask
    parts = () if index is None else index
    bias, dense = (
        None if x is None else take(x, *_columns(x.shape, key, ring, hop))
        for x in (inputs.bias, mask.dense)
    )
    mask = dataclasses.replace(
        mask, dense=dense, **dict(zip(_index_names(inputs), parts, strict=True))
    )
    return dataclasses.replace(inputs, key=key, value=value, bias=bias, mask=mask)


def _columns(
    shape: tuple[int, ...], key: jax.Array, ring: Ring, hop: jax.Array | int
) -> list[Span]:
    """Return the span of this hop's keys in a bias or dense mask [B|1, N|1, T|1, S|1] for all keys."""
    keys = key.shape[1]
    rows = [Span(0, size) for size in shape[:3]]
    return [*rows, Span(ring.shard_number(hop) * keys, keys)]
