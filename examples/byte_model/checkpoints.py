"""Checkpoints of a training run (example 08) for any mesh and number of processes, and SIGTERM."""

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

from byte_model.transformer import Job

KEPT = 3  # latest checkpoints


def save(directory: Path, job: Job, losses: list[float], state: nnx.State) -> None:
    """Write a checkpoint after `len(losses)` steps, with all processes, and wait for it.

    It waits because the next step takes the memory of the state. The losses are in the checkpoint, and
    Orbax renames it when it is complete.
    """
    record = {"job": _settings(job), "losses": losses}
    items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    with _manager(directory) as manager:
        manager.save(len(losses), args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def restore(
    directory: Path, job: Job, state_like: nnx.State
) -> tuple[list[float], nnx.State] | None:
    """Return the losses and the state of the latest checkpoint, sharded like `state_like`.

    Return None if there is no checkpoint, and raise ValueError if it belongs to another job.
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
    """Return told_to_end(steps done), to be called after each step.

    It returns True in all processes after the same step, some time after one of them got a SIGTERM, the
    notice that its machine will be taken away.
    """
    if jax.process_count() > 1:  # JAX handles the signal and lets the processes agree on a step
        return reached_preemption_sync_point
    noticed = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: noticed.set())
    return lambda _: noticed.is_set()


def disturb(done: int, at: int | None, by: str) -> None:
    """Send a signal to one of the processes after step `at`, for tests."""
    if at is None or done < at:
        return
    if done == at and jax.process_index() == jax.process_count() // 2:
        os.kill(os.getpid(), signal.Signals[by])
    if by == "SIGTERM" and jax.process_count() > 1:
        time.sleep(0.3)  # JAX looks once a second whether the signal has come


def _manager(directory: Path) -> ocp.CheckpointManager:
    """Return Orbax's manager, which removes the files of an interrupted save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(directory, options=options)


def _settings(job: Job) -> dict[str, Any]:
    """Return the settings on which the losses depend, except by rounding."""
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
            "pass the same settings, or a new directory"
        )
