"""Choose the combine that moves a call's states, or its keys, in the least time; and say why."""

import dataclasses
from collections.abc import Iterable

from distattn import cost
from distattn.amounts import bytes_text, count_text, seconds_text
from distattn.cost import Shape, Topology, Traffic
from distattn.traffic import QUERY_REPLICATED, QUERY_SHARDED, fits, sum_traffic, traffic


@dataclasses.dataclass(frozen=True)
class Choice:
    """A combine, what it is predicted to cost, and what the others would."""

    combine: str
    predicted_s: float  # of the movement and the merges; the attention itself is not in it
    bytes_sent: float  # by the device that sends most
    alternatives: tuple[tuple[str, float], ...]  # (combine, seconds), the next best first
    reason: str


def choose(
    shape: Shape,
    topology: Topology,
    *,
    query_sharded: bool,
    candidates: Iterable[str] | None = None,
) -> Choice:
    """The fastest combine by `cost.time_s`; of equals the first.

    Only movement and merges are compared, because the attention is the same work under all: whether
    queries or keys are gathered, D devices share its pairs. Memory is not compared: 'gather_kv'
    holds all keys and values on every device.

    Args:
      shape: sizes over all devices that take part.
      topology: the devices, and what connects them.
      query_sharded: whether the query is sharded along T over these devices, or replicated.
      candidates: names to choose among; None for all that fit the query:
        'butterfly', 'psum', 'all_gather' if replicated; 'reduce_scatter', 'gather_kv', 'ring' if
        sharded, and, where the heads divide, 'ulysses', and with two levels or more 'ulysses_ring' and
        'ulysses_gather_kv'.

    Returns:
      Choice.

    Raises:
      ValueError: no candidates, or one that does not fit.
    """
    known = QUERY_SHARDED if query_sharded else QUERY_REPLICATED
    fitting = tuple(name for name in known if fits(name, shape, topology))
    names = tuple(fitting if candidates is None else candidates)
    if not names or not set(names) <= set(fitting):
        raise ValueError(
            f"candidates is {names}; for query_sharded={query_sharded} they must be some of "
            f"{fitting}: name one or more of these, or pass None for all"
        )
    amounts = {name: traffic(name, shape, topology) for name in names}
    seconds = {name: cost.time_s(amounts[name], topology) for name in names}
    best, *others = sorted(names, key=lambda name: seconds[name])  # stable
    alternatives = tuple((name, seconds[name]) for name in others)
    return Choice(
        combine=best,
        predicted_s=seconds[best],
        bytes_sent=amounts[best].bytes_sent,
        alternatives=alternatives,
        reason=_reason(best, seconds[best], amounts[best], alternatives, topology),
    )


def choose_sum(payload_bytes: int, topology: Topology) -> str:
    """How an array is summed over devices in the least time: 'psum', one all-reduce, or 'butterfly'."""
    names = ("psum", "butterfly")
    return min(
        names, key=lambda name: cost.time_s(sum_traffic(name, payload_bytes, topology), topology)
    )


def _reason(
    best: str,
    seconds: float,
    amounts: Traffic,
    alternatives: tuple[tuple[str, float], ...],
    topology: Topology,
) -> str:
    if topology.size == 1:
        return f"{best}: one device, nothing moves"
    sent = f"{bytes_text(amounts.bytes_sent)} a device in {count_text(amounts.messages, 'message')}"
    work = f"{sent} of {count_text(amounts.launches, 'launch', 'launches')}"
    others = ", ".join(f"{name} {seconds_text(s)}" for name, s in alternatives)
    where = f"{topology.size} {topology.platform} devices"
    compared = f"against {others}" if others else "the only candidate"
    return f"{best} on {where}: {work}, {seconds_text(seconds)}; {compared}"
