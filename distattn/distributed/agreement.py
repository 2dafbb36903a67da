"""Processes that wait for each other, and are told which of them differ or do not come.

All goes through the key-value store of JAX's coordination service, not through collectives: no device
waits, shapes need not agree, and a time-out is an exception. The processes meet in numbered rounds, each
under a name: they must come to the same places in the same order, and are told where they do not.
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

ROUNDS = "distattn/rounds"  # of the keys in the store
TIMEOUT_S = 60.0
KNOWN_S = 10  # for all to read what all have handed in


@dataclasses.dataclass
class _Progress:
    """How often this process has met the others: the same everywhere while the programs agree."""

    rounds: int = 0  # since the last loss
    lost: frozenset[int] = frozenset()  # the ranks that are waited for no more

    def next_folder(self) -> str:
        """Of the next round, in the store."""
        self.rounds += 1
        return self.folder(self.rounds)

    def folder(self, number: int) -> str:
        return f"{ROUNDS}/{len(self.lost)}/{number}"


_progress = _Progress()


def barrier(name: str, timeout_s: float = TIMEOUT_S) -> None:
    """Waits until every process has come here.

    Args:
      name: of the place, the same in every process.
      timeout_s: seconds to wait.

    Raises:
      TimeoutError: some have not come; says which.
      RuntimeError: some are at another place, or have failed; says which.

    Example:
      >>> import distattn
      >>> distattn.distributed.barrier("weights are loaded", timeout_s=60)
    """
    meet(name, "", timeout_s=timeout_s)


def assert_same(name: str, value: Any, *, timeout_s: float = TIMEOUT_S) -> None:
    """Checks that every process has the same value, and tells all of them which differ in what.

    Every process calls it. Where collectives are to follow, hand in what they depend on: shapes, the mesh,
    `jax.jit(f).lower(...)`. Processes that disagree in these hang, or read what was never written.

    Args:
      name: of the place, the same in every process.
      value: a pytree. Numbers, text and numpy arrays are compared by value; JAX arrays and
        `ShapeDtypeStruct` by shape, dtype and PartitionSpec; meshes by axes and the order of their devices;
        what has an `as_text` (a lowered or compiled program) by a hash of that; functions by name.
      timeout_s: seconds to wait for the others.

    Raises:
      RuntimeError: a difference, by rank; or as `barrier`.
      TimeoutError: as `barrier`.

    Example:
      >>> import jax, jax.numpy as jnp, distattn
      >>> step = jax.jit(lambda x: 2 * x).lower(jnp.ones(8))
      >>> distattn.distributed.assert_same("before the first step", {"step": step, "batch": 8})
    """
    texts = meet(name, json.dumps(describe(value)), timeout_s=timeout_s)
    if len(set(texts.values())) > 1:
        facts = {rank: json.loads(text) for rank, text in texts.items()}
        fail_together(
            RuntimeError(f"assert_same({name!r}): the processes differ{differences(facts)}")
        )


def meet(name: str, text: str, *, timeout_s: float) -> dict[int, str]:
    """What each process hands in, by rank, when all have come.

    Args:
      name: of the place, the same in every process.
      text: of any length; it is read once by each process that handed in another.
      timeout_s: seconds to wait for the others.

    Raises:
      TimeoutError: some have not come; says which.
      RuntimeError: some are at another place, or have failed; says which.
    """
    client, rank, _ = coordination()
    if client is None:
        return {0: text}
    folder, digest = _progress.next_folder(), hashlib.sha256(text.encode()).hexdigest()
    client.key_value_set(f"{folder}/texts/{digest}", text, allow_overwrite=True)
    client.key_value_set(f"{folder}/ranks/{rank}", json.dumps([name, digest]))
    try:
        _wait(client, folder, timeout_s)
    except jax.errors.JaxRuntimeError as error:
        raise _failure(error, name, timeout_s, _posted(client, folder)) from None
    came = _posted(client, folder)
    if rank == 0:  # all are past the round before: nobody reads that any more
        client.key_value_delete(f"{_progress.folder(_progress.rounds - 1)}/")
    if elsewhere := _places(came):
        fail_together(
            RuntimeError(f"the processes are at different places of the program{elsewhere}")
        )
    texts = {digest: text}
    for other in {other for _, other in came.values()} - {digest}:
        texts[other] = client.key_value_try_get(f"{folder}/texts/{other}")
    return {other: texts[came[other][1]] for other in sorted(came)}


def from_first(name: str, work: Callable[[], Any], *, timeout_s: float) -> Any:
    """What work() gives in the first process that is there, in all of them; its error too.

    Args:
      name: of the place, the same in every process.
      work: gives what JSON can say; done by the first process alone.
      timeout_s: seconds to wait for it, and for the others.

    Raises:
      ValueError, OSError: what work() raises.
      RuntimeError, TimeoutError: as `barrier`.
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
    """Raises what all processes raise, when all of them know it.

    With rank 0 ends the service from which the others learn it, and JAX ends them before they can say it.
    """
    client, _, _ = coordination()
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _wait(client, _progress.next_folder(), KNOWN_S)
    raise error


def present() -> list[int]:
    """The ranks that are waited for."""
    _, _, count = coordination()
    return [rank for rank in range(count) if rank not in _progress.lost]


def go_on_without(lost: Iterable[int]) -> None:
    """Waits for these ranks no more. All others call it at the same place: they count anew from there."""
    _progress.lost |= set(lost)
    _progress.rounds = 0


def differences(facts: Mapping[int, dict[str, str]]) -> str:
    """In what the ranks differ: a line for each name, with the ranks of each value, most first."""
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
    """'rank 3', or 'ranks 0, 2-5'."""
    numbers = sorted(numbers)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' * (len(numbers) != 1)} {', '.join(parts)}"


def describe(value: Any) -> dict[str, str]:
    """Each leaf of a tree, by its path, as text that is the same where the leaf is."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda leaf: leaf is None)
    return {jax.tree_util.keystr(path) or "value": _describe(leaf) for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    match leaf:
        case Mesh():
            kinds = (str(kind).rpartition(".")[2] for kind in leaf.axis_types)
            axes = (f"{n}={s} ({k})" for (n, s), k in zip(leaf.shape.items(), kinds, strict=True))
            order = " ".join(str(device.id) for device in leaf.devices.flat)
            return f"mesh {', '.join(axes)} of devices {order}"
        case jax.Array() | jax.ShapeDtypeStruct():
            spec = getattr(leaf.sharding, "spec", None)
            where = "" if spec is None else f" {tuple(spec)}"
            return f"{leaf.dtype}{list(leaf.shape)}{where}"
        case np.ndarray() | np.generic():
            if leaf.size == 1:
                return f"{leaf.dtype}{list(leaf.shape)} {leaf.item()!r}"
            return f"{leaf.dtype}{list(leaf.shape)} with hash {_hash(leaf.tobytes())}"
    if hasattr(leaf, "as_text"):
        text = leaf.as_text()
        return f"a program of {len(text)} characters with hash {_hash(text.encode())}"
    text = repr(leaf)
    if " at 0x" in text:  # an address: of this process alone
        kind = leaf if callable(leaf) and hasattr(leaf, "__qualname__") else type(leaf)
        return f"{kind.__module__}.{kind.__qualname__}"
    return text


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _wait(client: Any, folder: str, timeout_s: float) -> None:
    """JAX's barrier: of all processes that it knows of, unless some are lost."""
    among = present() if _progress.lost else None
    client.wait_at_barrier(folder, max(1, round(1000 * timeout_s)), among)


def _posted(client: Any, folder: str) -> dict[int, list[str]]:
    posted = client.key_value_dir_get(f"{folder}/ranks/")
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in posted}


def _places(came: dict[int, list[str]]) -> str:
    return differences({rank: {"place": repr(came[rank][0])} for rank in sorted(came)})


def _failure(
    error: Exception, name: str, timeout_s: float, came: dict[int, list[str]]
) -> Exception:
    """What a barrier that fails is for the user."""
    count = len(present())
    missing = [rank for rank in present() if rank not in came]
    if not str(error).startswith("DEADLINE_EXCEEDED"):
        reason = str(error).partition("\n")[0]
        absent = f"; {ranks(missing)} had not come" if missing else ""
        return RuntimeError(f"waiting at {name!r}: a process has failed{absent}: {reason}")
    if not missing:
        return TimeoutError(
            f"some processes came to {name!r} later than within {timeout_s:g} s{_places(came)}"
        )
    return TimeoutError(
        f"{ranks(missing)} of {count} did not come to {name!r} within {timeout_s:g} s{_places(came)}"
    )
