"""The axes of a mesh that shard the slots, sequences and KV heads of a cache; a body run on shards.

Functions take the arrays of a cache by name, in a dict, and name their dimensions by letters: L layers,
B sequences, S slots, K heads, H and V widths, D devices that share the slots, d the same, not sharded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.sharding import Sharding as AnySharding

from distattn.attention.sharding import Placement, Sharding, given_axes, read_placement
from distattn.collectives.mesh import axes_of, free_axes, on_shards, partition_spec

Arrays = dict[str, jax.Array]
FREE = -1  # the tag of a slot without a token

# The arrays that hold tokens, which a replica has too.
TOKEN_LETTERS = {
    "key": "LBSKH",
    "value": "LBSKV",
    "key_scale": "LBSK",
    "value_scale": "LBSK",
    "positions": "BS",
}
COUNTERS = ("next_position", "appended", "placed", "overflow", "refused")
LETTERS = {**TOKEN_LETTERS, "counts": "Bd", **dict.fromkeys(COUNTERS, "B")}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Axes of the mesh that shard slots, sequences and heads; without a mesh, one device."""

    mesh: Mesh | AbstractMesh | None = None
    slots: tuple[str, ...] = ()  # in the order of the mesh, as the others
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    replica_source: tuple[int, ...] = ()  # whose slots each of the D devices works on; (): its own

    def size(self, axes: tuple[str, ...]) -> int:
        """Return the number of devices along the axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if axes else 1

    @property
    def devices(self) -> int:
        """D, the devices that share the slots of a sequence."""
        return self.size(self.slots)

    def rounded(self, capacity: int) -> int:
        """Return the number of slots for a capacity, rounded up to a multiple of the devices."""
        return math.ceil(capacity / self.devices) * self.devices

    def check_divides(self, name: str, size: int, axes: tuple[str, ...]) -> None:
        """Raise ValueError if the devices along the axes do not divide an argument."""
        if size % self.size(axes):
            raise ValueError(
                f"{name} is {size}, and sharding shards it over {axes}, {self.size(axes)} devices, which "
                "do not divide it; pass a multiple of them, or shard it over fewer axes"
            )

    def spec(self, letters: str) -> PartitionSpec:
        """Return the PartitionSpec of an array from its letters."""
        axes = {"B": self.batch, "S": self.slots, "D": self.slots, "K": self.heads}
        return partition_spec(letters, axes)

    def sharding(self, letters: str) -> NamedSharding | None:
        """Return the sharding of an array from its letters; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(letters))

    def target(self, letters: str) -> AnySharding:
        """Return where to move an array; without a mesh, the default device. Call it in `context`."""
        return self.sharding(letters) or SingleDeviceSharding(*jnp.zeros(()).devices())

    def context(self) -> AbstractContextManager[Any]:
        """Set the mesh of the layout as the mesh of the context, whatever mesh the caller has set."""
        return jax.set_mesh(Mesh(np.empty((), object), ()) if self.mesh is None else self.mesh)

    def fetch(self, x: jax.Array) -> np.ndarray:
        """Return a whole array of the cache to the host."""
        if self.mesh is not None and not x.is_fully_addressable:
            x = jax.device_put(x, NamedSharding(self.mesh, PartitionSpec()))
        return np.asarray(x)

    def free_axes(self) -> tuple[str, ...]:
        """Return the axes that are not manual in a `shard_map` around."""
        return free_axes(self.mesh)

    def check_outside(self) -> None:
        """Raise ValueError inside a `shard_map` over an axis of the cache."""
        if self.mesh is None:
            return
        if taken := {*self.slots, *self.batch, *self.heads} - set(self.free_axes()):
            raise ValueError(
                f"the cache is sharded over {sorted(taken)[0]!r}, and the call is inside a shard_map over "
                "that axis; call the cache outside: it opens its own shard_map"
            )

    def run(
        self,
        body: Callable[..., Any],
        letters: Sequence[str | None],
        out_letters: Sequence[str],
        *arguments: Any,
        static: tuple[Any, ...] = (),
    ) -> tuple[Any, ...]:
        """Run body(self, *static, *arguments) on every device, on its own shards.

        Outside of jit too, it is compiled once for each body and its static arguments.

        Args:
          body: a function of a module; returns a tuple.
          letters: of each argument's dimensions; None for an argument that is None.
          out_letters: of each result's dimensions.
          *arguments: global arrays.
          static: hashable arguments.

        Returns:
          tuple of global arrays.
        """
        self.check_outside()
        return _run(self, body, static, tuple(letters), tuple(out_letters), *arguments)

    def update(
        self,
        body: Callable[..., Any],
        arrays: Arrays,
        letters: dict[str, str],
        *arguments: Any,
        argument_letters: Sequence[str | None] = (),
        static: tuple[Any, ...] = (),
    ) -> Arrays:
        """Run body(self, *static, *arguments, *arrays), which changes the arrays that have letters here."""
        dims = (*letters.values(),)
        inputs = (*arguments, *(arrays[name] for name in letters))
        changed = self.run(body, (*argument_letters, *dims), dims, *inputs, static=static)
        return dict(zip(letters, changed, strict=True))

    # For the body of `run`.

    def rank(self) -> jax.Array | int:
        """Return the index of the device, among D, whose slots the body works on."""
        if not self.slots:
            return 0
        index = lax.axis_index(self.slots)
        return jnp.asarray(self.replica_source, jnp.int32)[index] if self.replica_source else index

    def gather(self, x: jax.Array) -> jax.Array:
        """Return [B, D] from the [B] of each device."""
        return lax.all_gather(x, self.slots, axis=1) if self.slots else x[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    layout: Layout,
    body: Callable[..., Any],
    static: tuple[Any, ...],
    letters: tuple[str | None, ...],
    out_letters: tuple[str, ...],
    *arguments: Any,
) -> tuple[Any, ...]:
    mapped = on_shards(
        functools.partial(body, layout, *static),
        mesh=layout.mesh,
        in_specs=tuple(None if x is None else layout.spec(x) for x in letters),
        out_specs=tuple(layout.spec(x) for x in out_letters),
        axis_names=() if layout.mesh is None else layout.free_axes(),
    )
    return mapped(*arguments)


def empty(
    layout: Layout, letters: dict[str, str], size: dict[str, int | None], dtype: jnp.dtype
) -> Arrays:
    """Return empty arrays of a cache, by name.

    Args:
      layout: of the cache.
      letters: of each array.
      size: of each letter.
      dtype: of keys and values.
    """
    kinds = {
        **dict.fromkeys(("key", "value"), (0, dtype)),
        **dict.fromkeys(("key_scale", "value_scale"), (0, jnp.float32)),
        "positions": (FREE, jnp.int32),
        "overflow": (False, jnp.bool_),
    }
    return {
        name: _filler(
            tuple(size[letter] for letter in dims),
            *kinds.get(name, (0, jnp.int32)),
            layout.sharding(dims),
        )()
        for name, dims in letters.items()
    }


@functools.lru_cache
def _filler(
    shape: tuple[int, ...], fill: Any, dtype: Any, sharding: NamedSharding | None
) -> Callable[[], jax.Array]:
    """Return a function that makes an array with its sharding, compiled once for each kind of array."""
    make = functools.partial(jnp.full, shape, fill, dtype)
    return make if sharding is None else jax.jit(make, out_shardings=sharding)


def letters_of(names: Iterable[str], layers: bool) -> dict[str, str]:
    """Return the letters of arrays of a cache by name; L only in a cache with layers."""
    return {name: LETTERS[name] if layers else LETTERS[name].removeprefix("L") for name in names}


def letters_in(arrays: Arrays) -> dict[str, str]:
    """Return the letters of these arrays, among them the keys, by name."""
    return letters_of(arrays, arrays["key"].ndim == 5)


def read_layout(sharding: Sharding, mesh: Mesh | AbstractMesh | None = None) -> Layout:
    """Return the layout of a cache from the sharding of its keys [B, slots, K, H].

    Args:
      sharding: `jax.NamedSharding`, or `jax.P` over the mesh of `jax.set_mesh`; None: one device.
      mesh: for a `jax.P` if `jax.set_mesh` has not set one.

    Raises:
      ValueError: a sharding that is invalid for keys.
    """
    if sharding is None:
        return Layout()
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
    elif not (context := jax.sharding.get_abstract_mesh()).empty:
        traced = isinstance(jnp.zeros(()), Tracer)
        mesh = context if traced else jax.sharding.get_mesh()
    if mesh is None:
        mesh = AbstractMesh((), ())
        if isinstance(sharding, PartitionSpec) and any(sharding):
            raise ValueError(
                f"sharding is {sharding}, but there is no mesh; pass a jax.NamedSharding, or enter "
                "jax.set_mesh(mesh)"
            )
    axes = given_axes("sharding", sharding, "BSKH", mesh, free_axes(mesh))
    batch, slots, heads = (
        tuple(axis for axis in mesh.axis_names if axis in axes[letter]) for letter in "BSK"
    )
    return Layout(mesh, slots, batch, heads) if mesh.axis_names else Layout()


def query_placement(
    layout: Layout, query: jax.Array, key: jax.Array, value: jax.Array, query_sharding: Sharding
) -> Placement:
    """Return the placement of an attention call on a cache; key and value may have layers."""
    if layout.mesh is None:
        spec = getattr(query_sharding, "spec", query_sharding)
        if spec is not None and not isinstance(spec, PartitionSpec):
            raise ValueError(
                f"query_sharding is {query_sharding!r}; it must be a jax.NamedSharding, a jax.P, or None: "
                "the cache is on one device, leave it None"
            )
        if spec is not None and any(spec):
            raise ValueError(
                f"query_sharding is {spec}, and the cache is on one device; leave query_sharding None, or "
                "create the cache with sharding="
            )
        return Placement()
    keys, values = (jax.ShapeDtypeStruct(x.shape[-4:], x.dtype) for x in (key, value))
    placement = read_placement(
        query,
        keys,
        values,
        query_sharding,
        layout.sharding("BSKH"),
        names=("query_sharding", "sharding"),
    )
    return dataclasses.replace(
        placement,
        mesh=layout.mesh,
        batch=layout.batch,
        # One head serves the queries of all heads, on whatever devices these are.
        heads=layout.heads or (placement.heads if keys.shape[2] == 1 else ()),
        key=layout.slots,
        query_known=True,  # a sharding that can't be read counts as replicated
        manual=layout.free_axes(),
        compiler_sharded=False,
    )


def sharded_along(x: jax.Array, dimension: int, layout: Layout) -> bool:
    """Return True if x is seen to be sharded along a dimension over the axes of the slots."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    if not layout.slots or not isinstance(sharding, NamedSharding):
        return False
    return axes_of(sharding.spec, dimension) == layout.slots
