"""Keys and values that arrive separately, each in its own order: bring every value to its key.

Attention needs pairs. If keys and values are stored on many devices in two unrelated orders, one
exchange makes them pairs: the positions go round the devices once (`pair`), then each value goes to
the device of its key (`exchange`). A device never holds more than its share of either.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from distattn._compat import vary, varying_axes
from distattn.attention.sharding import Placement, Sharding, bring, read_placement
from distattn.collectives.mesh import axes_of, mesh_order, on_shards, place
from distattn.collectives.pair_exchange import exchange, pair
from distattn.planning.plan import Axes


def align(
    value: jax.Array,
    value_positions: jax.Array,
    key_positions: jax.Array,
    *,
    sharding: Sharding = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the values in the order of the keys, each on the device of its key.

        value_aligned[b, i] = value[b, j]   where   value_positions[b, j] == key_positions[b, i]

    Positions are any integers; those below zero mark empty slots, which take no part. A position
    that is missing on one side, or is there twice on one side, has no unique partner. Outside jit
    that is an error. Under jit its slots become empty slots and are counted, so look at
    `unmatched`. Differentiable with respect to `value`, any number of times; the gradient is the
    same exchange backwards. Memory on each device is O(S / D), the index included.

    Args:
      value: [B, S, K, V].
      value_positions: int32[S] or int32[B, S], the position of each value.
      key_positions: int32[S'] or int32[B, S'], the position of each key; S' may differ from S.
      sharding: `jax.NamedSharding` or `jax.P` of value as passed; None: read from value. Inside jit under
        Auto axes it can't be read: pass it. Without a mesh nothing is exchanged.

    Returns:
      value_aligned [B, S', K, V], zero in slots without a unique partner; key_positions int32[S'],
      or int32[B, S'] if any positions are given per row, -1 in those slots; unmatched int32[B], the
      number of keys and values without a unique partner.

    Raises:
      ValueError: wrong shapes or dtypes, S or S' not divisible by the devices, an axis that is not
        of the mesh, or, outside jit, positions that do not pair up.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distattn import layouts
      >>> value = jnp.array([30.0, 10.0, 20.0]).reshape(1, 3, 1, 1)
      >>> aligned, positions, unmatched = layouts.align(value, jnp.array([3, 1, 2]), jnp.array([1, 2, 3]))
      >>> aligned.ravel().tolist(), positions.tolist(), unmatched.tolist()
      ([10.0, 20.0, 30.0], [1, 2, 3], [0])

    Reference: Rabe & Staats, arXiv 2112.05682, section 2, for the index that another order costs.
    """
    _check(value, value_positions, key_positions)
    value = jnp.asarray(value)
    rows, one_row = _rows(value_positions, key_positions)
    run = _Run.read(value, rows, sharding)
    if sharding is not None:
        value = bring(run.placement, "BSKV", value)
        rows = [bring(run.placement, "BS", x) for x in rows]
    there, back, kept, unmatched = _pair_under_jit(run, *run.place("BS", *rows))
    if not isinstance(unmatched, Tracer) and jnp.any(unmatched):
        raise ValueError(_explain(rows, one_row))
    aligned = _move_under_jit(run, *run.place("BSKV", value), there, back)
    return _result(aligned, kept, unmatched, one_row)


def align_shards(
    value: jax.Array,
    value_positions: jax.Array,
    key_positions: jax.Array,
    *,
    axis_name: str | tuple[str, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`align` inside the caller's own `shard_map`: all arrays are this device's shards.

    Differentiable with `check_vma` True and False.

    Args:
      value: [B, L, K, V].
      value_positions: int32[L] or int32[B, L].
      key_positions: int32[M] or int32[B, M].
      axis_name: the manual axis, or axes, over which keys and values are sharded.

    Returns:
      value_aligned [B, M, K, V], key_positions int32[M] or int32[B, M], unmatched int32[B], counted
      over all devices of the axis. See `align`.

    Raises:
      ValueError: wrong shapes or dtypes, or an axis that is not manual here.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from distattn import layouts
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("x",))
      >>> def bring(value, value_positions, key_positions):
      ...     return layouts.align_shards(value, value_positions, key_positions, axis_name="x")[0]
      >>> specs = P(None, "x"), P("x"), P("x")
      >>> run = jax.jit(jax.shard_map(bring, mesh=mesh, in_specs=specs, out_specs=specs[0]))
      >>> value, positions = jnp.arange(8.0).reshape(1, 8, 1, 1), jnp.arange(8)
      >>> run(value, positions, positions[::-1]).ravel().tolist()
      [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    """
    _check(value, value_positions, key_positions)
    run = _Run(mesh_order(axis_name))
    rows, one_row = _rows(value_positions, key_positions)
    there, back, kept, unmatched = _pair(run, *rows)
    # The operand of a custom_vjp must vary where its cotangent does; this cast's transpose sums it.
    value = vary(jnp.asarray(value), varying_axes(value, there, back))
    return _result(_move(run, value, there, back), kept, unmatched, one_row)


@dataclasses.dataclass(frozen=True)
class _Run:
    """How the work of one device is run: on every device, or, with an empty placement, here."""

    axes: tuple[str, ...]  # shard S, in the order of the mesh
    placement: Placement = Placement()

    @classmethod
    def read(cls, value: jax.Array, rows: Any, sharding: Sharding) -> _Run:
        """Read the sharding of value, which the positions take too."""
        manual_axes = jax.sharding.get_abstract_mesh().manual_axes
        if isinstance(sharding, PartitionSpec | NamedSharding) and (
            inside := {*axes_of(getattr(sharding, "spec", sharding), 1)} & {*manual_axes}
        ):
            raise ValueError(
                f"sharding is {sharding}, but {inside} is manual here: call align_shards inside a shard_map"
            )
        placement = read_placement(
            value, value, value, key_value_sharding=sharding, names=("sharding", "sharding")
        )
        devices = placement.size(placement.key)
        for name, x in zip(("value_positions", "key_positions"), rows, strict=True):
            if x.shape[1] % devices:
                raise ValueError(
                    f"{name} has {x.shape[1]} slots, no multiple of the {devices} devices along "
                    f"{placement.key}; pad to {math.ceil(x.shape[1] / devices) * devices} slots, "
                    "with -1 for the position of an empty one"
                )
        names = placement.mesh.axis_names if placement.key else ()
        return cls(tuple(name for name in names if name in placement.key), placement)

    def place(self, letters: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Return the arrays with the shardings that `__call__` takes, over Explicit axes."""
        placement = self.placement
        specs = tuple(placement.spec(letters, x.shape) for x in arrays)
        return place(arrays, specs, mesh=placement.mesh, axis_names=placement.manual)

    def spec(self, letters: str, shape: tuple[int, ...]) -> PartitionSpec:
        """See `Placement.spec`."""
        return self.placement.spec(letters, shape)

    def __call__(
        self, f: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, *arrays: jax.Array
    ) -> Any:
        """f(*arrays, axes) on every device's shards."""
        return on_shards(
            functools.partial(f, axes=self.axes),
            mesh=self.placement.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=self.placement.manual,
        )(*arrays)


def _pair(run: _Run, values: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
    """`pair`, and the key positions with -1 where there is no partner: int32[R, M]."""

    def shards(values: jax.Array, keys: jax.Array, axes: Axes) -> tuple[jax.Array, ...]:
        there, back, unmatched = pair(values, keys, axes)
        return there, back, jnp.where(back < 0, -1, keys), unmatched

    there, back = (run.spec("BS", x.shape) for x in (values, keys))
    unmatched = run.spec("B", keys.shape[:1])
    return run(shards, (there, back), (there, back, back, unmatched), values, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _move(run: _Run, x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """`exchange`. The custom_vjp is outside the shard_map, of which each direction has its own."""
    specs = run.spec("BSKV", x.shape), run.spec("BS", there.shape), run.spec("BS", back.shape)
    result = run.spec("BSKV", (x.shape[0], back.shape[1], *x.shape[2:]))
    return run(exchange, specs, result, x, there, back)


def _move_forward(run: _Run, x: jax.Array, there: jax.Array, back: jax.Array) -> tuple[Any, ...]:
    return _move(run, x, there, back), (there, back)


def _move_backward(run: _Run, index: tuple[Any, ...], cotangent: jax.Array) -> tuple[Any, ...]:
    there, back = index
    return _move(run, cotangent, back, there), None, None


_move.defvjp(_move_forward, _move_backward)
# Outside jit the loops are compiled once, and up to JAX 0.10 a partly manual shard_map needs jit
# anyway.
_pair_under_jit = jax.jit(_pair, static_argnums=0)
_move_under_jit = jax.jit(_move, static_argnums=0)


def _rows(value_positions: Any, key_positions: Any) -> tuple[list[jax.Array], bool]:
    """Return both as int32[R, S], R = 1 or B, and whether neither is given per sequence."""
    positions = [jnp.asarray(x).astype(jnp.int32) for x in (value_positions, key_positions)]
    rows = [x if x.ndim == 2 else x[None] for x in positions]
    count = max(x.shape[0] for x in rows)
    one_row = max(x.ndim for x in positions) == 1
    return [jnp.broadcast_to(x, (count, x.shape[1])) for x in rows], one_row


def _result(
    aligned: jax.Array, kept: jax.Array, unmatched: jax.Array, one_row: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    kept = jnp.squeeze(kept, 0) if one_row else kept
    return aligned, kept, jnp.broadcast_to(unmatched, aligned.shape[:1])


def _check(value: Any, value_positions: Any, key_positions: Any) -> None:
    shape = np.shape(value)
    if len(shape) != 4:
        raise ValueError(
            f"value has shape {shape}; it must be [B, S, K, V]: for one row without B pass "
            "value[None]"
        )
    for name, x, length in (
        ("value_positions", value_positions, shape[1]),
        ("key_positions", key_positions, None),
    ):
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        dtype, got = x.dtype, x.shape
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"{name} is {dtype}; positions are int32: convert with astype('int32')"
            )
        if len(got) not in (1, 2) or (len(got) == 2 and got[0] != shape[0]):
            raise ValueError(
                f"{name} has shape {got}; it must be [S] or [B, S] with B={shape[0]} as in value: "
                "give one position for each slot, the same for all rows or row by row"
            )
        if length is not None and got[-1] != length:
            raise ValueError(
                f"{name} has shape {got}, and value has S={length}: give one position for each "
                "value"
            )


def _explain(rows: list[jax.Array], one_row: bool) -> str:
    remedy = (
        "give each position once on either side and -1 to slots that are to be ignored, or call "
        "align under jit, where such slots become empty ones and are counted"
    )
    if not all(x.is_fully_addressable for x in rows):
        return f"value_positions and key_positions do not pair up: {remedy}"
    for row, (values, keys) in enumerate(zip(*map(np.asarray, rows), strict=True)):
        if faults := list(_faults(values[values >= 0], keys[keys >= 0])):
            place = "" if one_row else f" in row {row}"
            return f"positions do not pair up{place}: {'; '.join(faults)}. Remedy: {remedy}"
    raise AssertionError("the devices found positions without a partner, and the host does not")


def _faults(values: np.ndarray, keys: np.ndarray) -> Iterator[str]:
    for name, x in (("value_positions", values), ("key_positions", keys)):
        unique, counts = np.unique(x, return_counts=True)
        if (counts > 1).any():
            yield f"{name} has {_examples(unique[counts > 1])} more than once"
    if (lonely := np.setdiff1d(keys, values)).size:
        yield f"key_positions has {_examples(lonely)}, which value_positions has not"
    if (lonely := np.setdiff1d(values, keys)).size:
        yield f"value_positions has {_examples(lonely)}, which key_positions has not"


def _examples(positions: np.ndarray) -> str:
    shown = ", ".join(str(x) for x in positions[:3])
    return shown if positions.size <= 3 else f"{shown} and {positions.size - 3} others"
