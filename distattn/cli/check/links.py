"""What a message along each axis of a mesh takes, and the line through it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from distattn.cli.check.programs import medians, on_mesh, prepare
from distattn.collectives.mesh import manual
from distattn.planning.chips import Link, fit_link

HOPS = 8  # of a program: what it takes to start one is shared by so many messages


@dataclasses.dataclass(frozen=True)
class Axis:
    """What was measured along an axis: one hop of every device to its neighbour, all at once."""

    link: Link
    residual: float  # root mean square of (fitted - measured) / measured
    samples: tuple[tuple[int, float], ...]  # (bytes, seconds) of one hop


def measure_axes(
    mesh: Mesh, axes: Sequence[str], sizes: Sequence[int], repeats: int, say: Callable[[str], None]
) -> dict[str, Axis]:
    """Times permutes along each axis, all sizes and axes in turn, and fits latency and bandwidth.

    Args:
      mesh: of devices of all processes.
      axes: of more than one device each.
      sizes: bytes of a message; two different ones or more, rounded up to multiples of 4.
      repeats: how often each is timed.
      say: is told what comes next.

    Returns:
      Axis by name, the same in every process.
    """
    programs, bytes_of = {}, {}
    for axis in axes:
        say(f"permutes along {axis}: compiling {len(sizes)} sizes")
        for size in sizes:
            items = max(1, -(-size // 4))
            x = on_mesh(
                np.ones(mesh.size * items, np.float32), mesh, PartitionSpec(mesh.axis_names)
            )
            name = f"permute of {4 * items} bytes along {axis}"
            programs[name] = (prepare(name, _hops(mesh, axis), x), (x,))
            bytes_of[name] = (axis, 4 * items)
    say(f"permutes: timing {len(programs)} of them {repeats} times")
    seconds = medians(programs, repeats)
    result = {}
    for axis in axes:
        samples = [(b, seconds[name] / HOPS) for name, (a, b) in bytes_of.items() if a == axis]
        result[axis] = Axis(*fit_link(samples), tuple(samples))
    return result


def _hops(mesh: Mesh, axis: str) -> Callable[[jax.Array], jax.Array]:
    size = mesh.shape[axis]
    pairs = [(i, (i + 1) % size) for i in range(size)]

    def body(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, HOPS, lambda _, y: lax.ppermute(y, axis, pairs), x)

    spec = PartitionSpec(mesh.axis_names)
    return manual(body, mesh=mesh, in_specs=(spec,), out_specs=spec, axis_names=mesh.axis_names)
