"""Steps of a cache on disk: saved from some devices, restored on others.

A step is a directory `<directory>/<step>`. It contains the arrays, which Orbax writes, in `arrays`, and
`manifest.json` with the cache's sizes and the size and CRC-32 of every file. It is written under another
name, `<step>.unfinished`, and renamed once all of it is on disk, so a step is complete or absent. Orbax
detects files that are cut short, but not numbers that have changed: the manifest is compared before
reading.

Orbax's `CheckpointManager` doesn't name the steps, for two reasons. It renames a step before a manifest of
its files could be in it. And every save of it calls JAX's preemption sync point with the step, which breaks
the count of a program that has its own sync points.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from distattn._compat import needed
from distattn.cache.layout import FREE, Arrays
from distattn.distributed.agreement import fail_together, from_first, meet, present, ranks

FORMAT = 1  # steps in other formats are refused
UNFINISHED = ".unfinished"
ARRAYS, MANIFEST = "arrays", "manifest.json"
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 1800.0  # for other processes, of which the first reads a whole step to check it


def save_step(
    directory: str | os.PathLike[str], step: int | None, arrays: Arrays, about: dict[str, Any]
) -> int:
    """Write a step and return its number; see `KVCache.save`.

    Args:
      directory: of all steps.
      step: a new number; None: one more than the largest.
      arrays: of the cache, by name.
      about: whatever is needed to read them (JSON).
    """
    directory = Path(directory).absolute()
    number: int = _by_first("KVCache.save", lambda: _begin(directory, step))
    unfinished = directory / f"{number}{UNFINISHED}"
    _check_shared(unfinished)
    with _checkpointer() as checkpointer:
        checkpointer.save(unfinished / ARRAYS, arrays)
        checkpointer.wait_until_finished()

    def finish() -> None:
        write_manifest(unfinished, {"format": FORMAT, **about})
        unfinished.rename(directory / str(number))
        _sync(directory)

    _by_first("KVCache.save: all is written", finish)
    return number


def open_step(directory: str | os.PathLike[str], step: int | None) -> tuple[Path, dict[str, Any]]:
    """Check a step, the largest by default; return its folder and what was saved about its arrays."""
    directory = Path(directory).absolute()

    def choose() -> int:
        number = _choose(directory, step)
        _check_whole(directory, number)
        return int(number)

    number = _by_first("KVCache.restore", choose)
    folder = directory / str(number)
    _check_shared(folder)
    about = _read_manifest(folder)["about"]
    if (written := about.pop("format")) != FORMAT:
        raise ValueError(
            f"step {number} in {directory} was written in the format {written}, and this release of "
            f"distattn reads the format {FORMAT}; use the release that wrote it"
        )
    return folder, about


def read_arrays(folder: Path, like: dict[str, jax.ShapeDtypeStruct], capacity: int) -> Arrays:
    """Read the arrays of a step; each device reads its own shards.

    Args:
      folder: from `open_step`.
      like: shape, dtype and sharding of each array, by name.
      capacity: slots that were saved; if there are more now, those at the end are free.
    """
    with _checkpointer() as checkpointer:
        arrays = checkpointer.restore(folder / ARRAYS, like, strict=False)
    return arrays | {"positions": _free_from(arrays["positions"], jnp.int32(capacity))}


@jax.jit
def _free_from(tags: jax.Array, slots: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(tags.shape[1], dtype=jnp.int32)[None] < slots, tags, FREE)


def check_processes(mesh: Mesh | AbstractMesh | None) -> None:
    """Raise an error unless Orbax is installed and the mesh has devices of all running processes."""
    _orbax()
    running = present()
    of_mesh = {jax.process_index()}
    if mesh is not None:
        of_mesh = {device.process_index for device in mesh.devices.flat}
    if of_mesh != set(running):
        raise NotImplementedError(
            f"a cache is saved and restored by all processes, {ranks(running)}, and this one is on devices "
            f"of {ranks(of_mesh)}; use a mesh that has devices of all (distattn.distributed.make_mesh)"
        )


def _orbax() -> ModuleType:
    with needed("orbax", by="saving or restoring a cache", extra="checkpoint"):
        import orbax.checkpoint
    return orbax.checkpoint


def _checkpointer() -> Any:
    """Return a checkpointer of Orbax for all running processes."""
    orbax, running = _orbax(), present()
    if len(running) == jax.process_count():
        return orbax.StandardCheckpointer()
    options = orbax.options.MultiprocessingOptions(
        primary_host=running[0],
        active_processes=set(running),
        barrier_sync_key_prefix="-".join(map(str, running)),
    )
    return orbax.StandardCheckpointer(multiprocessing_options=options)


def _by_first(name: str, work: Callable[[], Any]) -> Any:
    """Return the result of work() in the first process to all processes."""
    return from_first(name, work, timeout_s=TIMEOUT_S)


def _check_shared(folder: Path) -> None:
    """Raise ValueError in all processes unless all see the folder."""
    seen = meet("KVCache: the directory is there", str(folder.is_dir()), timeout_s=TIMEOUT_S)
    if blind := [rank for rank, text in seen.items() if text != str(True)]:
        fail_together(
            ValueError(
                f"directory {folder.parent} is not the same for all processes: {ranks(blind)} cannot see "
                f"{folder.name} in it; pass one on a file system that all of them share"
            )
        )


# The steps of a directory.


def _begin(directory: Path, step: int | None) -> int:
    """Make the unfinished directory of a new step and return its number."""
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
    shutil.rmtree(unfinished, ignore_errors=True)  # from an interrupted save
    unfinished.mkdir(parents=True)
    return int(step)


def _choose(directory: Path, step: int | None) -> int:
    steps, interrupted = _steps(directory), _steps(directory, UNFINISHED)
    if step in steps:
        return step
    note = f"; interrupted, and not complete: {interrupted}" if interrupted else ""
    if not steps or step is not None:
        missing = "no step" if step is None else f"no step {step}"
        raise FileNotFoundError(f"{missing} in {directory}; complete steps there: {steps}{note}")
    if interrupted and interrupted[-1] > steps[-1]:
        warnings.warn(f"step {steps[-1]} of {directory} is restored{note}", stacklevel=6)
    return steps[-1]


def _check_whole(directory: Path, step: int) -> None:
    """Raise OSError if a step is damaged, with the largest earlier step that is not."""
    damage = _damage(directory / str(step))
    if damage is None:
        return
    earlier = [x for x in reversed(_steps(directory)) if x < step]
    whole = next((x for x in earlier if _damage(directory / str(x)) is None), None)
    remedy = "no earlier step is whole" if whole is None else f"pass step={whole}, which is whole"
    raise OSError(f"step {step} in {directory} is damaged: {damage}; {remedy}")


def _steps(directory: Path, suffix: str = "") -> list[int]:
    """Return the numbers of the folders in a directory with this suffix, sorted."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    numbers = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(int(x) for x in numbers if x.isdecimal() and x == str(int(x)))


# The manifest of a step.


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Write the size and CRC-32 of every file of a folder, and `about`, to its manifest."""
    contents = {"about": about, "files": _fingerprints(folder)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"crc32": _crc32(contents), "contents": contents}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the contents of a manifest; raise OSError or ValueError if it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        contents, crc32 = manifest["contents"], manifest["crc32"]
    except (KeyError, TypeError) as error:
        raise ValueError("it is not a manifest") from error
    if _crc32(contents) != crc32:
        raise ValueError("its CRC-32 is not that of what was written")
    return contents


def _damage(folder: Path) -> str | None:
    """Say how the files of a folder differ from its manifest; None if they don't."""
    try:
        files = _read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return f"file {MANIFEST} cannot be read ({error})"
    present_files = _fingerprints(folder)
    for name, (size, crc32) in files.items():
        if name not in present_files:
            return f"file {name} is missing"
        if present_files[name][0] != size:
            return f"file {name} has {present_files[name][0]} bytes, and {size} were written"
        if present_files[name][1] != crc32:
            return f"file {name} has changed: its CRC-32 is not that of what was written"
    return None


def _sync(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(contents: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def _fingerprints(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and CRC-32 of every file of a folder but the manifest, by its path in the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor() as pool:  # zlib lets other threads run
        return {
            path.relative_to(folder).as_posix(): fingerprint
            for path, fingerprint in zip(paths, pool.map(_fingerprint, paths), strict=True)
        }


def _fingerprint(path: Path) -> tuple[int, int]:
    size = crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
    return size, crc32
