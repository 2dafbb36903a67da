"""A cache on disk: saved from some devices, restored on others.

A step is a directory, `<directory>/<step>`, that holds the arrays, as Orbax writes them, in `arrays` and in
`manifest.json` what the cache was like and the size and CRC-32 of every file. It is written under another
name, `<step>.unfinished`, and renamed when all of it is on disk: a step is there as a whole or not at all.
Orbax itself notices files that are cut short, but not numbers that have changed, so the manifest is
compared before anything is read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh

from distattn._compat import needed
from distattn.cache import steps
from distattn.cache.capacity import counted
from distattn.cache.layout import Layout, context_of, letters_of, make_layout, sharding_of
from distattn.cache.manifest import read_manifest, sync, write_manifest
from distattn.cache.replicas import check_replicas
from distattn.cache.slots import FREE
from distattn.distributed.agreement import fail_together, from_first, meet, present, ranks
from distattn.planning.plan import AxisNames

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache

FORMAT = 2  # of a step; a reader refuses those that it does not know
SINCE = {"refused": 2}  # the format with which an array came; restored from an older one it is 0
ARRAYS = "arrays"
TIMEOUT_S = 1800.0  # for other processes, of which the first reads a step to check it


def save(self: KVCache, directory: str | os.PathLike[str], step: int | None = None) -> int:
    """Writes the cache to disk, as a step of its own; returns when all of it is there.

    Args:
      directory: of all steps, on a file system of this machine, or one that all processes share; made if
        it is not there. Steps are directories in it, and may be deleted.
      step: a number that is not there yet; None: one more than the largest, or 0.

    Returns:
      The step. Until it is complete the directory has it under the name `<step>.unfinished`, and `restore`
      does not count it: an interrupted save changes nothing of the steps before.

    Raises:
      ValueError: a step that is there already; a directory that only some processes see.
      ModuleNotFoundError: Orbax is not installed.
      NotImplementedError: a cache that does not lie on all processes of the program.
      TimeoutError, RuntimeError: a process that does not come, as `distattn.distributed.barrier`.

    Example:
      >>> import tempfile, jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 3, 1, 4))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     step = cache.append(new, new).save(directory)
      ...     restored = distattn.KVCache.restore(directory)
      >>> step, restored.next_position.tolist()
      (0, [3])
    """
    orbax = _orbax()
    _check_processes(self.layout)
    if isinstance(self.positions, Tracer):
        raise ValueError("save was called under a trace of the cache; call it outside of jit")
    directory = Path(directory).absolute()
    number: int = _by_first("KVCache.save", lambda: steps.begin(directory, step))
    unfinished = directory / f"{number}{steps.UNFINISHED}"
    _check_shared(unfinished)
    arrays = {name: getattr(self, name) for name in letters_of(self) if name != "counts"}
    with _checkpointer(orbax) as checkpointer:
        checkpointer.save(unfinished / ARRAYS, arrays)
        checkpointer.wait_until_finished()

    def finish() -> None:
        write_manifest(unfinished, _description(self))
        unfinished.rename(directory / str(number))
        sync(directory)

    _by_first("KVCache.save: all is written", finish)
    return number


@classmethod  # of KVCache, which imports it
def restore(
    cls: type[KVCache],
    directory: str | os.PathLike[str],
    step: int | None = None,
    *,
    capacity: int | None = None,
    mesh: Mesh | None = None,
    axis_name: AxisNames = None,
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
    placement: str | None = None,
    replicas: int = 1,
) -> KVCache:
    """A cache that was saved, on these devices, whatever they were when it was saved.

    Each device reads its own share of the slots.

    Args:
      directory: as in `save`.
      step: which; None: the largest. A larger one whose save was interrupted is passed over with a warning.
      capacity: tokens of a row, S; None: that of the cache that was saved, rounded up to a multiple of the
        devices.
      mesh: as in `create`, like the next three: None without a named axis is one device.
      axis_name: axis, or tuple of axes, over which slots are spread; None: the mesh's only axis.
      batch_axis_name: axes that shard the rows.
      heads_axis_name: axes that shard the key/value heads.
      placement: where new tokens go from now on; None: as before.
      replicas: of each token from now on, as in `create`; one copy is saved, however many there were.

    Returns:
      The cache, which goes on as the one that was saved would have.

    Raises:
      FileNotFoundError: no such step, or none; says which there are, and which were interrupted.
      OSError: a file of the step is missing or has changed; says which, and what earlier step is whole.
      ValueError: what `create` or `resize` refuses; a step in the format of a newer release.
      ModuleNotFoundError: Orbax is not installed.
      NotImplementedError: a mesh that has not the devices of all processes of the program.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 3, 1, 4))
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("x",))  # other devices than those that it was saved from
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     step = cache.append(new, new).save(directory, step=7)
      ...     restored = distattn.KVCache.restore(directory, mesh=mesh)
      >>> restored.next_position.tolist(), restored.layout.devices == mesh.size
      ([3], True)
    """
    orbax = _orbax()
    layout = make_layout(mesh, axis_name, batch_axis_name, heads_axis_name)
    check_replicas(replicas, layout)
    _check_processes(layout)
    directory = Path(directory).absolute()
    step = _by_first("KVCache.restore", lambda: steps.choose(directory, step))
    folder = directory / str(step)
    _check_shared(folder)
    saved = read_manifest(folder)
    written = saved.pop("format")
    if written not in range(1, FORMAT + 1):
        raise ValueError(
            f"step {step} in {directory} was written in the format {written}, and this release of distattn "
            f"reads 1 .. {FORMAT}; use the release that wrote it, or a newer one"
        )
    with context_of(layout):
        cache = _read(orbax, cls, folder / ARRAYS, saved, written, layout)
    if placement is None and capacity is None and replicas == 1:
        return cache
    return cache.resize(capacity, placement=placement, replicas=replicas)


def _read(
    orbax: ModuleType,
    cls: type[KVCache],
    folder: Path,
    saved: dict[str, Any],
    written: int,
    layout: Layout,
) -> KVCache:
    """The cache, with its slots over the devices of the layout."""
    blank = jax.eval_shape(
        lambda: cls.create(
            **saved,
            mesh=layout.mesh,
            axis_name=layout.slots,
            batch_axis_name=layout.batch,
            heads_axis_name=layout.heads,
        )
    )
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for name, letters in letters_of(blank).items():
        if name != "counts":
            x, sharding = getattr(blank, name), sharding_of(layout, letters)
            wanted[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    later = {name: wanted.pop(name) for name, since in SINCE.items() if since > written}
    # Not strict: where these devices do not divide the slots, there are more of them now, at the end.
    with _checkpointer(orbax) as checkpointer:
        arrays = checkpointer.restore(folder, wanted, strict=False)
    arrays["positions"] = _free_from(arrays["positions"], jnp.int32(saved["capacity"]))
    arrays |= {name: jnp.zeros(x.shape, x.dtype, device=x.sharding) for name, x in later.items()}
    return counted(dataclasses.replace(blank, **arrays))


@jax.jit
def _free_from(tags: jax.Array, slots: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(tags.shape[1], dtype=jnp.int32)[None] < slots, tags, FREE)


def _orbax() -> ModuleType:
    with needed("orbax", by="saving or restoring a cache", extra="checkpoint"):
        import orbax.checkpoint
    return orbax.checkpoint


def _checkpointer(orbax: ModuleType) -> Any:
    """Orbax's, of all processes that are there."""
    there = present()
    if len(there) == jax.process_count():
        return orbax.StandardCheckpointer()
    options = orbax.options.MultiprocessingOptions(
        primary_host=there[0],
        active_processes=set(there),
        barrier_sync_key_prefix="-".join(map(str, there)),
    )
    return orbax.StandardCheckpointer(multiprocessing_options=options)


def _check_processes(layout: Layout) -> None:
    """That the cache lies on all processes that are there."""
    mesh, there = layout.mesh, present()
    on = (
        {device.process_index for device in mesh.devices.flat}
        if mesh is not None
        else {jax.process_index()}
    )
    if on != set(there):
        raise NotImplementedError(
            f"a cache is saved and restored by all processes, {ranks(there)}, and this one is to lie on "
            f"devices of {ranks(on)}; use a mesh that has devices of all (distattn.distributed.make_mesh)"
        )


def _by_first(name: str, work: Callable[[], Any]) -> Any:
    """What the first process finds, in all of them."""
    return from_first(name, work, timeout_s=TIMEOUT_S)


def _check_shared(folder: Path) -> None:
    """That all processes see it."""
    seen = meet("KVCache: the directory is there", str(folder.is_dir()), timeout_s=TIMEOUT_S)
    if blind := [rank for rank, text in seen.items() if text != str(True)]:
        fail_together(
            ValueError(
                f"directory {folder.parent} is not the same for all processes: {ranks(blind)} cannot see "
                f"{folder.name} in it; pass one on a file system that all of them share"
            )
        )


def _description(cache: KVCache) -> dict[str, Any]:
    """The format, and what `create` needs to be told for such a cache, but for where it lies."""
    return {
        "format": FORMAT,
        "batch": cache.positions.shape[0],
        "capacity": cache.capacity,
        "num_kv_heads": cache.key.shape[-2],
        "head_dim": cache.key.shape[-1],
        "value_dim": cache.value.shape[-1],
        "layers": cache.layers,
        "dtype": cache.key.dtype.name,
        "placement": cache.placement,
    }
