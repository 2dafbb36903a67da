"""How a cache lies on a mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from distattn.collectives.mesh import check_mesh, free_axes, manual
from distattn.planning.plan import Axes, AxisNames, as_axes

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of the mesh shard the slots, the rows and the heads. No mesh: one device.

    Dimensions are named by letters: B rows, S slots, K heads, D devices along the axes of the slots; all
    others are not sharded.
    """

    mesh: Mesh | None = None
    slots: Axes = ()  # in the order of the mesh
    batch: Axes = ()
    heads: Axes = ()
    wards: tuple[int, ...] = ()  # whose share each of the D devices works on; (): its own

    def size(self, axes: Axes) -> int:
        """The number of devices along the axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if axes else 1

    @property
    def devices(self) -> int:
        """D, the devices over which the slots of a row are spread."""
        return self.size(self.slots)

    def rounded(self, capacity: int) -> int:
        """The slots of a row that hold so many tokens: a multiple of the devices."""
        return math.ceil(capacity / self.devices) * self.devices

    def rank(self) -> jax.Array | int:
        """Which of the D devices' shares this is; to be called in the body of `run`."""
        if not self.slots:
            return 0
        own = lax.axis_index(self.slots)
        return jnp.asarray(self.wards, jnp.int32)[own] if self.wards else own

    def gather(self, x: jax.Array) -> jax.Array:
        """[B, D] from [B] of each device; to be called in the body of `run`."""
        if not self.slots:
            return x[:, None]
        return lax.all_gather(x, self.slots, axis=1)

    def numbers(self, x: jax.Array) -> np.ndarray:
        """An array of the cache, whole, as numbers that the host sees; to be called outside of `run`."""
        if self.mesh is not None and not x.is_fully_addressable:
            x = jax.device_put(x, NamedSharding(self.mesh, PartitionSpec()))
        return np.asarray(x)

    def free_axes(self) -> Axes:
        """The axes that no shard_map around has taken; those that the cache does not name hold copies."""
        return free_axes(self.mesh)

    def check_outside(self) -> None:
        """That the call is not inside a shard_map over an axis of the cache."""
        if self.mesh is None:
            return
        if taken := {*self.slots, *self.batch, *self.heads} - set(self.free_axes()):
            raise ValueError(
                f"the cache lies on the axis {sorted(taken)[0]!r}, and the call is inside a shard_map over "
                "it; call the cache outside: it brings its own"
            )

    def spec(self, letters: str) -> PartitionSpec:
        """The PartitionSpec of an array from the letters of its dimensions."""
        axes = {"B": self.batch, "S": self.slots, "D": self.slots, "K": self.heads}
        return PartitionSpec(*(axes.get(letter) or None for letter in letters))

    def sharding(self, letters: str) -> NamedSharding | None:
        """The same as a sharding; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(letters))

    def run(
        self,
        body: Callable[..., Any],
        letters: Sequence[str | None],
        out_letters: Sequence[str],
        *arguments: Any,
        static: tuple[Any, ...] = (),
    ) -> tuple[Any, ...]:
        """body(self, *static, *arguments), by every device on its own shards: a tuple of arrays.

        Compiled once for a body, a function of a module, and its static arguments, also outside of jit.

        Args:
          body: what a device does; returns a tuple.
          letters: of each argument's dimensions; None for an argument that is None.
          out_letters: of each result's.
          *arguments: global arrays.
          static: what is not an array, hashable.

        Returns:
          tuple of global arrays.
        """
        self.check_outside()
        return _run(self, body, static, tuple(letters), tuple(out_letters), *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    layout: Layout,
    body: Callable[..., Any],
    static: tuple[Any, ...],
    letters: tuple[str | None, ...],
    out_letters: tuple[str, ...],
    *arguments: Any,
) -> tuple[Any, ...]:
    body = functools.partial(body, layout, *static)
    if layout.mesh is None:
        return body(*arguments)
    mapped = manual(
        body,
        mesh=layout.mesh,
        in_specs=tuple(None if x is None else layout.spec(x) for x in letters),
        out_specs=tuple(layout.spec(x) for x in out_letters),
        axis_names=layout.free_axes(),
    )
    return mapped(*arguments)


def context_of(layout: Layout) -> AbstractContextManager[Any]:
    """The layout's own mesh as the one of the context, whichever the caller has set."""
    return jax.set_mesh(Mesh(np.empty((), object), ()) if layout.mesh is None else layout.mesh)


def sharding_of(layout: Layout, letters: str) -> Sharding:
    """That of an array, from the letters of its dimensions; without a mesh the default device's.

    To be called in the context of the layout.
    """
    return layout.sharding(letters) or SingleDeviceSharding(*jnp.zeros(()).devices())


def all_letters(stacked: bool) -> dict[str, str]:
    """The letters of the dimensions of each array that a cache may have, by name."""
    stack = "L" if stacked else ""
    return {
        **dict.fromkeys(("key", "value"), f"{stack}BSK."),
        **dict.fromkeys(("key_scale", "value_scale"), f"{stack}BSK"),
        "positions": "BS",
        "counts": "B.",
        **dict.fromkeys(("next_position", "appended", "placed", "overflow", "refused"), "B"),
    }


def letters_of(cache: "KVCache") -> dict[str, str]:
    """The same of those that this cache has."""
    letters = all_letters(cache.layers is not None)
    return {name: x for name, x in letters.items() if getattr(cache, name) is not None}


def make_layout(
    mesh: Mesh | None, axis_name: AxisNames, batch_axis_name: AxisNames, heads_axis_name: AxisNames
) -> Layout:
    """A layout from what the user says, or a ValueError.

    Args:
      mesh: a Mesh; None: that of `jax.set_mesh` if an axis is named, else no mesh.
      axis_name: of the slots; None: the mesh's, if it has one only.
      batch_axis_name: of the rows.
      heads_axis_name: of the key/value heads.

    Returns:
      Layout.
    """
    named = {
        "axis_name": as_axes("axis_name", axis_name),
        "batch_axis_name": as_axes("batch_axis_name", batch_axis_name),
        "heads_axis_name": as_axes("heads_axis_name", heads_axis_name),
    }
    if mesh is not None:
        check_mesh(mesh)
    else:
        first = next(((name, axes) for name, axes in named.items() if axes), None)
        if first is None:
            return Layout()
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"{first[0]} is {first[1]}, but there is no mesh; pass mesh=, or enter jax.set_mesh(mesh)"
            )
    if not named["axis_name"]:
        if len(mesh.axis_names) != 1:
            raise ValueError(
                f"axis_name is {axis_name!r} and the mesh has the axes {mesh.axis_names}; pass the one, "
                "or a tuple, over which the slots are to lie"
            )
        named["axis_name"] = tuple(mesh.axis_names)
    seen: set[str] = set()
    for argument, axes in named.items():
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"{argument} {axis!r} is not an axis of the mesh; use one of {mesh.axis_names}"
                )
            if axis in seen:
                raise ValueError(
                    f"{argument} {axis!r} is named twice; an axis can shard one of slots, rows and heads"
                )
            seen.add(axis)
    slots, batch, heads = (
        tuple(axis for axis in mesh.axis_names if axis in axes) for axes in named.values()
    )
    return Layout(mesh, slots, batch, heads)
