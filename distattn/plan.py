"""A plan for a pod: does it fit, what does it send, what will it cost, which combine, and why.

By formula: nothing is compiled, and no device is needed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from distattn import cost
from distattn.amounts import bytes_text, seconds_text
from distattn.block_sizes import block_sizes, even, is_flat
from distattn.cost import Link, Shape, Topology, Traffic
from distattn.memory import bytes_per_device, largest_context
from distattn.planner import choose
from distattn.pods import Pod
from distattn.pods import pod as pod_of
from distattn.roofline import local_s
from distattn.traffic import QUERY_SHARDED, UNTIMED, gather_traffic, sum_traffic, traffic
from distattn.workload import Workload


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A combine, and what it would cost."""

    combine: str
    predicted_s: float  # one step: all layers
    bytes_per_device: int
    bytes_sent_per_device: float
    rounds: int  # messages of a layer's forward pass, one after another
    largest_context: int | None  # None: memory not known
    fits: bool
    why: str = ""  # it is not taken


@dataclasses.dataclass(frozen=True)
class Plan:
    """The combine to take, and what one step costs with it."""

    topology: str
    devices: int
    axes: dict[str, int]  # of the mesh, over which keys are sharded, slowest first
    query_sharded: bool
    combine: str
    axis_order: tuple[str, ...]  # in which states are merged: the fastest axis first
    block_size: int  # keys of a block on each device
    predicted_s: float  # one step, all layers: attention and exchange
    breakdown: dict[str, float]  # local_s, exchange_s: their sum is predicted_s
    bytes_per_device: int
    memory_bytes: int | None  # of a device, without what is reserved; None: not known
    bytes_sent_per_device: float
    rounds: int  # messages of a layer's forward pass, one after another
    largest_context: int | None
    fits: bool
    alternatives: tuple[Alternative, ...]  # the next best first
    reason: str

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self)


def plan(
    workload: Workload,
    pod: Pod | str,
    *,
    sharding: Mapping[str, int] | None = None,
    query_sharded: bool | None = None,
    combine: str | None = None,
    links: Mapping[str, Link] | None = None,
    reserved_bytes: int = 0,
) -> Plan:
    """The combine with the least predicted time, of those that fit in memory.

    The exchange is what `planner.choose` predicts, as for `combine='auto'`, here with the links of the
    pod; the attention itself is `roofline.local_s`, the same for all. In training the backward pass is
    added to both.

    Args:
      workload: one step.
      pod: the devices, or their name, as `pods.pod` takes it.
      sharding: axes of the mesh, slowest first, by name; None: one for each dimension of the network.
      query_sharded: whether queries are sharded like keys; None: where there is one or more for each
        device.
      combine: to take this one whatever it costs. 'fused' counts as 'butterfly', whose messages it sends.
      links: measured, by axis: of `cost.links_from`.
      reserved_bytes: of a device's memory, for weights and all else.

    Returns:
      Plan.

    Raises:
      ValueError: axes that do not lie on the pod, an axis without a link, or a combine that does not fit
        how queries are sharded.
    """
    pod = pod_of(pod) if isinstance(pod, str) else pod
    axes = dict(pod.axes if sharding is None else sharding)
    topology = pod.topology(axes, links)
    sharded = workload.queries >= pod.devices > 1 if query_sharded is None else query_sharded
    shape, sizes = workload.shape, topology.sizes
    choice = choose(shape, topology, query_sharded=sharded)
    forward_s = {choice.combine: choice.predicted_s, **dict(choice.alternatives)}
    if combine in UNTIMED and pod.chip.platform == "tpu" and not sharded:
        forward_s[combine] = cost.time_s(traffic(combine, shape, topology), topology)
    if combine is not None and combine not in forward_s:
        raise ValueError(
            f"combine is {combine!r}; for {workload.queries} queries, "
            f"{'sharded like keys' if sharded else 'whole on each device'}, on axes {axes} it must be one "
            f"of {tuple(forward_s)}: name one, or pass query_sharded={not sharded}"
        )
    local = workload.layers * local_s(
        shape,
        pod.devices,
        pod.chip,
        query_sharded=sharded,
        processes=pod.hosts,
        training=workload.training,
    )
    memory = None if pod.hbm_bytes is None else pod.hbm_bytes - reserved_bytes

    def priced(name: str) -> Alternative:
        amounts, exchange_s = traffic(name, shape, topology), forward_s[name]
        sent = amounts.bytes_sent
        if workload.training:
            back = backward_traffic(name, shape, topology)
            exchange_s, sent = exchange_s + cost.time_s(back, topology), sent + back.bytes_sent
        held = bytes_per_device(name, workload, sizes)
        return Alternative(
            combine=name,
            predicted_s=local + workload.layers * exchange_s,
            bytes_per_device=held,
            bytes_sent_per_device=workload.layers * sent,
            rounds=amounts.messages,
            largest_context=memory and largest_context(name, workload, sizes, memory),
            fits=memory is None or held <= memory,
        )

    # Sorting is stable: of equals the first, as in `choose`.
    ranking = sorted(map(priced, forward_s), key=lambda x: (not x.fits, x.predicted_s))
    best = next(x for x in ranking if combine in (None, x.combine))
    others = [dataclasses.replace(x, why=_why(x, best, memory)) for x in ranking if x is not best]
    return Plan(
        topology=pod.name,
        devices=pod.devices,
        axes=axes,
        query_sharded=sharded,
        combine=best.combine,
        axis_order=tuple(reversed(axes)),
        block_size=_block_size(workload, pod, sharded),
        predicted_s=best.predicted_s,
        breakdown={"local_s": local, "exchange_s": best.predicted_s - local},
        bytes_per_device=best.bytes_per_device,
        memory_bytes=memory,
        bytes_sent_per_device=best.bytes_sent_per_device,
        rounds=best.rounds,
        largest_context=best.largest_context,
        fits=best.fits,
        alternatives=tuple(others),
        reason=_reason(best, others, local, memory, pod, named=combine is not None),
    )


def backward_traffic(combine: str, shape: Shape, topology: Topology) -> Traffic:
    """What the backward pass of a combine exchanges: what the forward pass gathered, and gradients of it.

    The gradient of a whole query is summed over the devices; those of keys and values stay where they
    are, or go back by the way that these came, in float32.
    """
    if topology.size == 1:
        return Traffic()
    wide = dataclasses.replace(shape, itemsize=max(4, shape.itemsize))
    if combine not in QUERY_SHARDED:
        names = ("psum", "butterfly")
        sums = [sum_traffic(name, wide.query_bytes, topology) for name in names]
        return min(sums, key=lambda x: cost.time_s(x, topology))
    if combine == "reduce_scatter":
        rows = shape.query_bytes + wide.out_bytes  # queries, and cotangents of their results
        return gather_traffic(rows, topology) + gather_traffic(wide.query_bytes, topology)
    return traffic(combine, shape, topology) + traffic(combine, wide, topology)


def _block_size(workload: Workload, pod: Pod, query_sharded: bool) -> int:
    keys = -(-workload.context // pod.devices)
    queries = -(-workload.queries // pod.devices) if query_sharded else workload.queries
    cpu = pod.chip.platform == "cpu"
    flat = cpu and not workload.training and is_flat(workload.heads, workload.kv_heads, queries)
    _, size = block_sizes(
        queries,
        (workload.heads, workload.kv_heads),
        workload.head_dim,
        flat=flat,
        one_by_one=cpu,
        smaller=workload.training,
    )
    return even(keys, size)


def _why(other: Alternative, best: Alternative, memory: int | None) -> str:
    if not other.fits:
        return f"does not fit: {bytes_text(other.bytes_per_device)} of {bytes_text(memory or 0)}"
    ratio = other.predicted_s / best.predicted_s
    if ratio < 1:
        return f"faster, {ratio:.2f} of the time; it was not named"
    if ratio < 1.005:
        return "as fast, and later in the list"
    more = other.bytes_sent_per_device - best.bytes_sent_per_device
    rounds = other.rounds - best.rounds
    causes = []
    if more > 0:
        causes.append(f"{bytes_text(more)} more sent a device")
    if rounds > 0:
        causes.append(f"{rounds} more messages a layer, one after another")
    if "ring" in best.combine and "ring" not in other.combine:
        causes.append("nothing sent while attention is computed")
    return f"{ratio:.3g} times as long" + (f": {', '.join(causes)}" if causes else "")


def _reason(
    best: Alternative,
    others: Sequence[Alternative],
    local: float,
    memory: int | None,
    pod: Pod,
    *,
    named: bool,
) -> str:
    exchange = best.predicted_s - local
    what = (
        f"{best.combine} on {pod.name}, {pod.devices} devices: {seconds_text(best.predicted_s)} a step, "
        f"of which {seconds_text(local)} for attention itself and {seconds_text(exchange)} for the exchange"
    )
    taken = "named by you" if named else "the least time" if best.fits else "the fastest"
    fitting = [x for x in others if x.fits]
    if not best.fits:
        room = f"it needs {bytes_text(best.bytes_per_device)} a device of {bytes_text(memory or 0)}"
        if fitting:
            return f"{what}; {taken}, and it does not fit: {room}, where {fitting[0].combine} does"
        longest = max(x.largest_context or 0 for x in (best, *others))
        return (
            f"{what}; no combine fits: {room}. Take more devices, or a context of at most {longest}"
        )
    if not others:
        return f"{what}; {taken}, the only candidate"
    against = ", ".join(f"{x.combine} {seconds_text(x.predicted_s)}" for x in fitting)
    too_large = ", ".join(x.combine for x in others if not x.fits)
    parts = [
        f"against {against}" if against else "",
        f"{too_large} not fitting" if too_large else "",
    ]
    return f"{what}; {taken}, {'; '.join(part for part in parts if part)}"
