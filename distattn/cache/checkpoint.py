"""A cache on disk: saved from some devices, restored on others.

A step is a directory, `<directory>/<step>`, that holds the arrays, as Orbax writes them, in `arrays` and in
`manifest.json` what the cache was like and the size and CRC-32 of every file. It is written under another
name, `<step>.unfinished`, and renamed when all of it is on disk: a step is there as a whole or not at all.
Orbax itself notices files that are cut short, but not numbers that have changed, so the manifest is
compared before anything is read.
"""

import dataclasses
import os
import shutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from distattn.cache.capacity import counted
from distattn.cache.edits import FREE
from distattn.cache.layout import Layout, letters_of, make_layout
from distattn.cache.manifest import damage, read_manifest, sync, write_manifest
from distattn.cache.moving import context_of, sharding_of
from distattn.cache.replicas import check_replicas
from distattn.placement import AxisNames

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache

FORMAT = 1  # of a step; a reader refuses those that it does not know
ARRAYS, UNFINISHED = "arrays", ".unfinished"


def save(self: "KVCache", directory: str | os.PathLike, step: int | None = None) -> int:
    """Writes the cache to disk, as a step of its own; returns when all of it is there.

    Args:
      directory: of all steps, on a file system of this machine; made if it is not there. Steps are
        directories in it, and may be deleted.
      step: a number that is not there yet; None: one more than the largest, or 0.

    Returns:
      The step. Until it is complete the directory has it under the name `<step>.unfinished`, and `restore`
      does not count it: an interrupted save changes nothing of the steps before.

    Raises:
      ValueError: a step that is there already.
      ModuleNotFoundError: Orbax is not installed.
      NotImplementedError: a program of several processes.
    """
    orbax = _orbax()
    if isinstance(self.positions, Tracer):
        raise ValueError("save was called under a trace of the cache; call it outside of jit")
    directory = Path(directory).absolute()
    steps = _steps(directory)
    if step is None:
        step = max(steps, default=-1) + 1
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise ValueError(f"step is {step!r}; it must be an int of at least 0")
    if step in steps:
        raise ValueError(
            f"step={step} is in {directory} already (steps there: {steps}); a step is never overwritten: "
            "pass another one, or delete that directory first"
        )
    unfinished = directory / f"{step}{UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a save that was interrupted
    unfinished.mkdir(parents=True)
    arrays = {name: getattr(self, name) for name in letters_of(self) if name != "counts"}
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(unfinished / ARRAYS, arrays)
        checkpointer.wait_until_finished()
    write_manifest(unfinished, _description(self))
    unfinished.rename(directory / str(step))
    sync(directory)
    return step


def restore(
    cls: type["KVCache"],
    directory: str | os.PathLike,
    step: int | None = None,
    *,
    capacity: int | None = None,
    mesh: Mesh | None = None,
    axis_name: AxisNames = None,
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
    placement: str | None = None,
    replicas: int = 1,
) -> "KVCache":
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
      ValueError: what `create` or `resize` refuses; a step in the format of another release.
      ModuleNotFoundError: Orbax is not installed.
      NotImplementedError: a program of several processes.
    """
    orbax = _orbax()
    directory = Path(directory).absolute()
    step = _choose_step(directory, step)
    folder = directory / str(step)
    _check_whole(directory, step)
    saved = read_manifest(folder)
    if saved.pop("format") != FORMAT:
        raise ValueError(
            f"step {step} in {directory} was written in another format than {FORMAT}, the one that this "
            "release of distattn reads; use the release that wrote it, or a newer one"
        )
    layout = make_layout(mesh, axis_name, batch_axis_name, heads_axis_name)
    check_replicas(replicas, layout)
    with context_of(layout):
        cache = _read(orbax, cls, folder / ARRAYS, saved, layout)
    if placement is None and capacity is None and replicas == 1:
        return cache
    return cache.resize(capacity, placement=placement, replicas=replicas)


def _read(
    orbax: ModuleType, cls: type["KVCache"], folder: Path, saved: dict[str, Any], layout: Layout
) -> "KVCache":
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
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(layout, letters))
        for name, letters in letters_of(blank).items()
        if name != "counts" and (x := getattr(blank, name)) is not None
    }
    # Not strict: where these devices do not divide the slots, there are more of them now, at the end.
    with orbax.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder, wanted, strict=False)
    arrays["positions"] = _free_from(arrays["positions"], jnp.int32(saved["capacity"]))
    return counted(dataclasses.replace(blank, **arrays))


@jax.jit
def _free_from(tags: jax.Array, slots: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(tags.shape[1], dtype=jnp.int32)[None] < slots, tags, FREE)


def _orbax() -> ModuleType:
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"a cache is saved and restored by one process, and this program has {jax.process_count()}"
        )
    try:
        import orbax.checkpoint
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("orbax"):
            raise
        raise ModuleNotFoundError(
            "a cache is saved and restored with Orbax, which is not installed: "
            "pip install 'distattn[checkpoint]'",
            name=error.name,
        ) from error
    return orbax.checkpoint


def _steps(directory: Path, suffix: str = "") -> list[int]:
    """The steps in a directory, in order; with a suffix, those under such a name."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    numbers = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(int(x) for x in numbers if x.isdecimal() and x == str(int(x)))


def _choose_step(directory: Path, step: int | None) -> int:
    steps, interrupted = _steps(directory), _steps(directory, UNFINISHED)
    if step in steps:
        return step
    note = f"; interrupted, and not complete: {interrupted}" if interrupted else ""
    if not steps or step is not None:
        what = "no step" if step is None else f"no step {step}"
        raise FileNotFoundError(f"{what} in {directory}; complete steps there: {steps}{note}")
    if interrupted and interrupted[-1] > steps[-1]:
        warnings.warn(f"step {steps[-1]} of {directory} is restored{note}", stacklevel=3)
    return steps[-1]


def _check_whole(directory: Path, step: int) -> None:
    wrong = damage(directory / str(step))
    if wrong is None:
        return
    earlier = [x for x in reversed(_steps(directory)) if x < step]
    whole = next((x for x in earlier if damage(directory / str(x)) is None), None)
    remedy = "no earlier step is whole" if whole is None else f"pass step={whole}, which is whole"
    raise OSError(f"step {step} in {directory} is damaged: {wrong}; {remedy}")


def _description(cache: "KVCache") -> dict[str, Any]:
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
