"""Barriers, comparisons and errors that all processes share.

They go through the key-value store of JAX's coordination service. Collectives hang or return uninitialised
memory if the programs differ; here a difference raises an error that names the ranks. The processes meet in
numbered rounds, and must reach the same places in the same order.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from distattn._compat import coordination

TIMEOUT_S = 60.0
ACKNOWLEDGE_TIMEOUT_S = 10.0


@dataclasses.dataclass
class _Progress:
    """Rounds of this process so far; equal in all processes while their programs agree."""

    rounds: int = 0  # since the last loss
    lost: frozenset[int] = frozenset()  # ranks

    def folder(self) -> str:
        """Return the folder of the current round in the store."""
        return f"distattn/rounds/{len(self.lost)}/{self.rounds}"


_progress = _Progress()


def barrier(name: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until every process has reached this place.

    Args:
      name: name of the place, equal in every process.
      timeout_s: seconds to wait.

    Raises:
      TimeoutError: some ranks did not come; the error names them.
      RuntimeError: some ranks are at another place or have failed; the error names them.

    Examples:
      >>> import distattn
      >>> distattn.distributed.barrier("weights are loaded", timeout_s=60)
    """
    meet(name, "", timeout_s=timeout_s)


def assert_same(name: str, value: Any, *, timeout_s: float = TIMEOUT_S) -> None:
    """Raise an error in every process if their values differ.

    Call it in every process. Before collectives, compare what they depend on: shapes, the mesh,
    `jax.jit(f).lower(...)`. Processes that disagree about these hang or read uninitialised memory.

    Args:
      name: name of the place, equal in every process.
      value: a pytree. Numbers, text and numpy arrays are compared by value; JAX arrays and
        `ShapeDtypeStruct` by shape, dtype and PartitionSpec; meshes by axes and device order;
        lowered and compiled programs by a hash of their text; functions by name.
      timeout_s: seconds to wait for the others.

    Raises:
      RuntimeError: the values differ (the error lists the ranks of each value), or as in `barrier`.
      TimeoutError: as in `barrier`.

    Examples:
      >>> import jax, jax.numpy as jnp, distattn
      >>> step = jax.jit(lambda x: 2 * x).lower(jnp.ones(8))
      >>> distattn.distributed.assert_same("before the first step", {"step": step, "batch": 8})
    """
    texts = meet(name, json.dumps(describe(value)), timeout_s=timeout_s)
    facts = {rank: json.loads(text) for rank, text in texts.items()}
    if different := differences(facts):
        fail_together(RuntimeError(f"assert_same({name!r}): the processes differ{different}"))


def meet(name: str, text: str, *, timeout_s: float) -> dict[int, str]:
    """Wait for every process and return each rank's text.

    Args:
      name: name of the place, equal in every process.
      text: text of any length; each process reads each distinct text once.
      timeout_s: seconds to wait for the others.

    Raises:
      TimeoutError: some ranks did not come; the error names them.
      RuntimeError: some ranks are at another place or have failed; the error names them.
    """
    client, rank, _ = coordination()
    if client is None:
        return {0: text}
    previous = _progress.folder()
    _progress.rounds += 1
    folder, digest = _progress.folder(), hashlib.sha256(text.encode()).hexdigest()
    client.key_value_set(f"{folder}/texts/{digest}", text, allow_overwrite=True)
    client.key_value_set(f"{folder}/ranks/{rank}", json.dumps([name, digest]))
    failure = None
    try:
        _wait(client, folder, timeout_s)
    except jax.errors.JaxRuntimeError as error:
        failure = error
    posted = {
        int(key.rpartition("/")[2]): json.loads(entry)
        for key, entry in client.key_value_dir_get(f"{folder}/ranks/")
    }
    places = differences({other: {"place": repr(posted[other][0])} for other in sorted(posted)})
    if failure is not None:
        missing = [other for other in present() if other not in posted]
        raise _barrier_error(failure, name, timeout_s, missing, places)
    if rank == 0:  # every process has left the previous round
        client.key_value_delete(f"{previous}/")
    if places:
        fail_together(RuntimeError(f"the processes are at different places of the program{places}"))
    texts = {digest: text}
    for other in {other for _, other in posted.values()} - {digest}:
        texts[other] = client.key_value_try_get(f"{folder}/texts/{other}")
    return {other: texts[posted[other][1]] for other in sorted(posted)}


def _barrier_error(
    error: Exception, name: str, timeout_s: float, missing: list[int], places: str
) -> Exception:
    """Return the error that the user sees if JAX's barrier fails."""
    if not str(error).startswith("DEADLINE_EXCEEDED"):
        reason = str(error).partition("\n")[0]
        absent = f"; {ranks(missing)} had not come" if missing else ""
        return RuntimeError(f"waiting at {name!r}: a process has failed{absent}: {reason}")
    if not missing:
        return TimeoutError(
            f"some processes came to {name!r} later than within {timeout_s:g} s{places}"
        )
    return TimeoutError(
        f"{ranks(missing)} of {len(present())} did not come to {name!r} within {timeout_s:g} s{places}"
    )


def from_first(name: str, work: Callable[[], Any], *, timeout_s: float) -> Any:
    """Call `work` in the first present process; return its result, or raise its error, in all of them.

    Args:
      name: name of the place, equal in every process.
      work: function whose result JSON can hold.
      timeout_s: seconds to wait for `work` and for the others.

    Raises:
      ValueError, OSError: raised by `work`.
      RuntimeError, TimeoutError: as in `barrier`.
    """
    client, rank, _ = coordination()
    if client is None:
        return work()
    first, result = present()[0], []
    if rank == first:
        try:
            result = [work()]
        except (ValueError, OSError) as error:
            result = [type(error).__name__, str(error)]
    text = meet(name, json.dumps(result), timeout_s=timeout_s)[first]
    value, *message = json.loads(text)
    if message:
        kinds = (ValueError, FileNotFoundError, PermissionError)
        fail_together(next((x for x in kinds if x.__name__ == value), OSError)(*message))
    return value


def fail_together(error: Exception) -> NoReturn:
    """Raise an error that every process raises, after all of them know it.

    If rank 0 ended first, JAX would end the others before they can print the error.
    """
    client, _, _ = coordination()
    if client is not None:
        _progress.rounds += 1
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _wait(client, _progress.folder(), ACKNOWLEDGE_TIMEOUT_S)
    raise error


def _wait(client: Any, folder: str, timeout_s: float) -> None:
    """Wait at JAX's barrier for all processes that are not lost."""
    among = present() if _progress.lost else None
    client.wait_at_barrier(folder, max(1, round(1000 * timeout_s)), among)


def present() -> list[int]:
    """Return the ranks that are not lost."""
    _, _, count = coordination()
    return [rank for rank in range(count) if rank not in _progress.lost]


def exclude(lost: Iterable[int]) -> None:
    """Stop waiting for these ranks. All other processes call it at the same place."""
    _progress.lost |= set(lost)
    _progress.rounds = 0


def differences(facts: Mapping[int, dict[str, str]]) -> str:
    """Return a line for each fact that differs, with the ranks of each value; empty if none does."""
    lines = []
    for name in dict.fromkeys(itertools.chain.from_iterable(facts.values())):
        by_value: dict[str, list[int]] = {}
        for rank, fact in sorted(facts.items()):
            by_value.setdefault(fact.get(name, "absent"), []).append(rank)
        if len(by_value) > 1:
            groups = sorted(by_value.items(), key=lambda group: -len(group[1]))
            lines.append(f"\n  {name}: " + "; ".join(f"{text} on {ranks(r)}" for text, r in groups))
    return "".join(lines)


def ranks(numbers: Iterable[int]) -> str:
    """Return 'rank 3' or 'ranks 0, 2-5'."""
    numbers = sorted(numbers)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' * (len(numbers) != 1)} {', '.join(texts)}"


def describe(value: Any) -> dict[str, str]:
    """Return a text for each leaf of a pytree, by path; equal leaves have equal texts."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda leaf: leaf is None)
    return {jax.tree_util.keystr(path) or "value": _describe_leaf(leaf) for path, leaf in leaves}


def _describe_leaf(leaf: Any) -> str:
    match leaf:
        case Mesh():
            kinds = (str(kind).rpartition(".")[2] for kind in leaf.axis_types)
            axes = (f"{n}={s} ({k})" for (n, s), k in zip(leaf.shape.items(), kinds, strict=True))
            order = " ".join(str(device.id) for device in leaf.devices.flat)
            return f"mesh {', '.join(axes)} of devices {order}"
        case jax.Array() | jax.ShapeDtypeStruct():
            spec = getattr(leaf.sharding, "spec", None)
            return f"{leaf.dtype}{list(leaf.shape)}" + ("" if spec is None else f" {tuple(spec)}")
        case np.ndarray() | np.generic():
            content = repr(leaf.item()) if leaf.size == 1 else f"with hash {_hash(leaf.tobytes())}"
            return f"{leaf.dtype}{list(leaf.shape)} {content}"
    if hasattr(leaf, "as_text"):
        text = leaf.as_text()
        return f"a program of {len(text)} characters with hash {_hash(text.encode())}"
    text = repr(leaf)
    if " at 0x" in text:  # an address differs between processes
        kind = leaf if callable(leaf) and hasattr(leaf, "__qualname__") else type(leaf)
        return f"{kind.__module__}.{kind.__qualname__}"
    return text


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
