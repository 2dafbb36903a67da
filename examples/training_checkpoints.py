"""A training run (example 08) on disk, for any mesh and number of processes, and the notice to end."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental.multihost_utils import reached_preemption_sync_point

from byte_transformer import Job

KEPT = 3  # checkpoints, the latest


def save(directory: Path, job: Job, losses: list[float], state: nnx.State) -> None:
    """Writes a checkpoint behind `len(losses)` steps, with all processes, and waits for it.

    It has to wait: the next step takes the memory of the state. The losses are in the checkpoint (the
    first process writes them), so what is there is there as a whole: Orbax renames it when it is.
    """
    record = {"job": _settings(job), "losses": losses}
    items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    with _manager(directory) as manager:
        manager.save(len(losses), args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def restore(
    directory: Path, job: Job, state_like: nnx.State
) -> tuple[list[float], nnx.State] | None:
    """The latest checkpoint: the losses up to it, and the state, laid out as `state_like` says.

    None where there is no checkpoint. One of another job is an error.
    """
    with _manager(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        only = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = manager.restore(step, args=only)["record"]
        _check_same(directory, record["job"], _settings(job))
        only = ocp.args.Composite(state=ocp.args.StandardRestore(state_like))
        return record["losses"], manager.restore(step, args=only)["state"]


def listen() -> Callable[[int], bool]:
    """The function `told(steps done)`, to be called behind each step: is this the last one?

    True in all processes behind the same step, some time after one of them got a SIGTERM: the notice
    that its machine will be taken away.
    """
    if jax.process_count() > 1:  # JAX has taken the signal, and lets the processes agree on a step
        return reached_preemption_sync_point
    noticed = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    return lambda _: noticed.is_set()


def disturb(done: int, at: int | None, by: str) -> None:
    """What may happen to one of the processes, for tests: a signal behind step `at`."""
    if at is None or done < at:
        return
    if done == at and jax.process_index() == jax.process_count() // 2:
        os.kill(os.getpid(), signal.Signals[by])
    if by == "SIGTERM" and jax.process_count() > 1:
        time.sleep(0.3)  # JAX looks once a second whether the signal has come


def _manager(directory: Path) -> ocp.CheckpointManager:
    """Orbax's; what a save that was interrupted has left behind it removes."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options)


def _settings(job: Job) -> dict[str, Any]:
    """What the losses depend on, but for rounding."""
    settings = dataclasses.asdict(job)
    settings |= settings.pop("config")
    del settings["remat"], settings["reproducible"]
    return settings


def _check_same(directory: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    different = [
        f"{name} was {saved.get(name)} and is {value}"
        for name, value in given.items()
        if saved.get(name) != value
    ]
    if different:
        raise ValueError(
            f"the checkpoint in {directory} is of another run: {', '.join(different)}; "
            "pass the same, or a new directory"
        )
