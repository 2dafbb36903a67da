"""`KVCache`: keys and values of the tokens so far, on many devices, in any order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distattn.cache.layout import Layout, all_letters, make_layout
from distattn.cache.replicas import Replica, check_replicas
from distattn.cache.slots import FREE, PLACEMENTS
from distattn.cache.storage import is_quantised
from distattn.planning.plan import AxisNames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, in slots on many devices; a slot is tagged with a position.

    A pytree: pass it through `jax.jit`, donate it, carry it through `jax.lax.scan`. Every method returns
    a new cache and leaves the old one as it was; under `jit(..., donate_argnums)` the new one is written
    in place. All shapes are static, so nothing compiles anew from step to step.

    Make one with `create`. The letters are the package's; S is the capacity of a row, over all devices,
    and L the number of layers, without which the dimension is absent.

    Attributes:
      key: [L, B, S, K, H].
      value: [L, B, S, K, V].
      key_scale: f32[L, B, S, K], where the dtype is one of 8 bits; else None.
      value_scale: the same.
      positions: int32[B, S], whose key the slot holds, in all layers; -1: the slot is free.
      counts: int32[B, D], how many slots are occupied, for each row and device.
      next_position: int32[B], one past the newest position of the row.
      appended: int32[B], how many tokens the last append brought.
      placed: int32[B], how many tokens were ever appended to the row.
      overflow: bool[B], whether the last append was refused, the row left as it was.
      refused: int32[B], how many tokens were ever refused, by all appends since `create` or the row's last
        `reset`: to be read once, at the end of a loop under jit. A row that is a copy has its source's.
      replica: of each device the share of its ward, where each token is there twice; else None.
      layout: over which devices rows, slots and heads lie.
      placement: where a new token goes, as in `create`.

    Example:
      >>> import jax, jax.numpy as jnp, distattn
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("x",))
      >>> cache = distattn.KVCache.create(1, 16, 2, 4, dtype=jnp.float32, mesh=mesh)  # B, S, K, H
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
      >>> cache = cache.append(key, value)
      >>> wanted = jax.nn.dot_product_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(cache.attend(query), wanted, atol=1e-5)), cache.next_position.tolist()
      (True, [8])
    """

    key: jax.Array  # [L, B, S, K, H]
    value: jax.Array  # [L, B, S, K, V]
    key_scale: jax.Array | None  # f32[L, B, S, K]
    value_scale: jax.Array | None
    positions: jax.Array  # int32[B, S]
    counts: jax.Array  # int32[B, D]
    next_position: jax.Array  # int32[B]
    appended: jax.Array  # int32[B]
    placed: jax.Array  # int32[B]
    overflow: jax.Array  # bool[B]
    refused: jax.Array  # int32[B]
    replica: Replica | None
    layout: Layout = dataclasses.field(metadata={"static": True})
    placement: str = dataclasses.field(metadata={"static": True})

    @staticmethod
    def create(
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        layers: int | None = None,
        dtype: Any,
        mesh: Mesh | None = None,
        axis_name: AxisNames = None,
        batch_axis_name: AxisNames = None,
        heads_axis_name: AxisNames = None,
        placement: str = "least_loaded",
        replicas: int = 1,
    ) -> KVCache:
        """An empty cache.

        Args:
          batch: rows, B.
          capacity: tokens of a row, S; rounded up to a multiple of the devices (`cache.capacity`).
          num_kv_heads: K.
          head_dim: H.
          value_dim: V; None: H.
          layers: L, for all layers of a model under one set of tags; None: one layer, no such dimension.
          dtype: of keys and values at rest. int8 and the 8-bit floating-point dtypes are quantised, with
            a float32 scale for each slot and head (`distattn.cache.storage.quantise` states the error).
          mesh: the mesh; None: that of `jax.set_mesh` if an axis is named, else one device.
          axis_name: axis, or tuple of axes, over which slots are spread; None: the mesh's only axis.
          batch_axis_name: axes that shard the rows.
          heads_axis_name: axes that shard the key/value heads.
          placement: where a new token goes. 'least_loaded': to the device with the fewest of its row, so
            that a row is full only when all devices are; 'round_robin': to each in turn, and refused if
            that one is full; 'block': to the first device until it is full, then to the next.
          replicas: 2: each token lies on two devices of different hosts, so that `recover` loses none
            with a host; the cache takes twice the memory, and nothing more is sent, unless tokens come
            with owner='local'. In a program of one process the first of the axes stands for hosts.

        Returns:
          KVCache.

        Raises:
          ValueError: a size or dtype that cannot be, an axis that the mesh does not have.

        Example:
          >>> import jax.numpy as jnp, distattn
          >>> cache = distattn.KVCache.create(
          ...     batch=2, capacity=16, num_kv_heads=2, head_dim=4, layers=3, dtype=jnp.int8
          ... )
          >>> cache.key.shape, cache.key_scale.dtype, cache.capacity, cache.counts.tolist()
          ((3, 2, 16, 2, 4), dtype('float32'), 16, [[0], [0]])
        """
        sizes = {
            "batch": batch,
            "capacity": capacity,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "value_dim": head_dim if value_dim is None else value_dim,
            "layers": 1 if layers is None else layers,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name} is {size!r}; it must be an int of at least 1")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is {placement!r}; it must be one of {PLACEMENTS}")
        dtype = jnp.dtype(dtype)
        quantised = is_quantised(dtype)
        if not quantised and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"dtype is {dtype}; it must be floating point, or int8, which is quantised"
            )
        layout = make_layout(mesh, axis_name, batch_axis_name, heads_axis_name)
        for name, axes in (("batch", layout.batch), ("num_kv_heads", layout.heads)):
            if sizes[name] % layout.size(axes):
                raise ValueError(
                    f"{name} is {sizes[name]}, and the axes {axes} have {layout.size(axes)} devices; it "
                    "must be a multiple of them: choose another size, or shard over fewer axes"
                )
        check_replicas(replicas, layout)
        slots = layout.rounded(capacity)
        letters = all_letters(layers is not None)
        keys = (*(() if layers is None else (layers,)), batch, slots, num_kv_heads)

        def filled(name: str, shape: tuple[Any, ...], fill: Any, kind: Any) -> jax.Array:
            return _filler(shape, fill, jnp.dtype(kind), layout.sharding(letters[name]))()

        def share() -> dict[str, jax.Array | None]:
            return {
                "key": filled("key", (*keys, head_dim), 0, dtype),
                "value": filled("value", (*keys, sizes["value_dim"]), 0, dtype),
                "key_scale": filled("key_scale", keys, 0, jnp.float32) if quantised else None,
                "value_scale": filled("value_scale", keys, 0, jnp.float32) if quantised else None,
                "positions": filled("positions", (batch, slots), FREE, jnp.int32),
            }

        numbers = ("next_position", "appended", "placed", "refused")
        return KVCache(
            **share(),
            counts=filled("counts", (batch, layout.devices), 0, jnp.int32),
            overflow=filled("overflow", (batch,), False, jnp.bool_),
            **{name: filled(name, (batch,), 0, jnp.int32) for name in numbers},
            replica=Replica(**share()) if replicas == 2 else None,
            layout=layout,
            placement=placement,
        )

    @property
    def capacity(self) -> int:
        """S, the tokens that a row can hold, over all devices."""
        return self.positions.shape[1]

    @property
    def layers(self) -> int | None:
        """L, or None."""
        return self.key.shape[0] if self.key.ndim == 5 else None

    @property
    def replicas(self) -> int:
        """How many devices hold each token."""
        return 1 if self.replica is None else 2

    # Functions of the files below; imported here they are methods, to type checkers too.
    from distattn.cache.checkpoint import restore, save
    from distattn.cache.edits import accept, evict, reset, rewind
    from distattn.cache.forking import fork
    from distattn.cache.moving import resize
    from distattn.cache.reading import attend
    from distattn.cache.recovery import recover
    from distattn.cache.reserving import reserve
    from distattn.cache.writing import append, write


@functools.lru_cache
def _filler(
    shape: tuple[int, ...], fill: Any, dtype: jnp.dtype, sharding: NamedSharding | None
) -> Callable[[], jax.Array]:
    """Makes an array where it is to lie; compiled once for each kind of array."""
    make = functools.partial(jnp.full, shape, fill, dtype)
    return make if sharding is None else jax.jit(make, out_shardings=sharding)
