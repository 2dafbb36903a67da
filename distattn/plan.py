"""A plan for a pod: does it fit, what does it send, what will it cost, which combine, and why.

By formula: nothing is compiled, and no device is needed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from distattn import cost
from distattn.amounts import bytes_text, count_text, seconds_text
from distattn.backward_traffic import backward_traffic
from distattn.block_sizes import block_sizes, even, is_flat
from distattn.division import AxisNames, divide
from distattn.link import Link
from distattn.memory import bytes_per_device, key_value_bytes, largest_context
from distattn.planner import choose
from distattn.pods import Pod
from distattn.pods import pod as pod_of
from distattn.remedies import remedies
from distattn.roofline import local_s
from distattn.traffic import UNTIMED, traffic
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
    """The combine to take, or where none fits the one that holds least, and what one step costs with it."""

    workload: Workload
    topology: str
    devices: int
    axes: dict[str, int]  # of the mesh, slowest first
    key_axes: tuple[str, ...]  # of these, over which keys are sharded; the exchange is along them
    batch_axes: tuple[str, ...]
    heads_axes: tuple[str, ...]
    query_sharded: bool  # over the axes of the keys
    links: dict[str, Link] | None  # measured; None: those of the table of chips
    reserved_bytes: int  # of a device's memory
    combine: str
    axis_order: tuple[str, ...]  # in which states are merged: the fastest axis first
    block_size: int  # keys of a block on each device
    predicted_s: float  # one step, all layers: attention and exchange
    breakdown: dict[str, float]  # local_s, exchange_s: their sum is predicted_s
    bytes_per_device: int
    key_value_bytes_per_device: int  # of these, keys and values of all layers
    memory_bytes: int | None  # of a device, without what is reserved; None: not known
    bytes_sent_per_device: float
    rounds: int  # messages of a layer's forward pass, one after another
    largest_context: int | None
    fits: bool
    remedies: tuple[str, ...]  # where it does not fit, what would, each by itself
    alternatives: tuple[Alternative, ...]  # the next best first, and last what does not fit
    reason: str

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self)


def plan(
    workload: Workload,
    pod: Pod | str,
    *,
    sharding: Mapping[str, int] | None = None,
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
    query_sharded: bool | None = None,
    combine: str | None = None,
    links: Mapping[str, Link] | None = None,
    reserved_bytes: int = 0,
) -> Plan:
    """The combine with the least predicted time, of those that fit in memory.

    The exchange is what `planner.choose` predicts, as for `combine='auto'`, here with the links of the
    pod; the attention itself is `roofline.local_s`, the same for all. In training the backward pass is
    added to both.

    >>> found = plan(Workload(131072, batch=16, layers=32), "v5e:16x16")
    >>> found.combine, found.fits
    ('psum', True)
    >>> apart = plan(Workload(131072, batch=16, layers=32), "v5e:16x16", batch_axis_name="x")
    >>> apart.key_axes, apart.bytes_sent_per_device < found.bytes_sent_per_device
    (('y',), True)

    Args:
      workload: one step.
      pod: the devices, or their name, as `pods.pod` takes it.
      sharding: axes of the mesh, slowest first, by name; None: one for each dimension of the network.
      batch_axis_name: those of the axes over which B is sharded, as in `dot_product_attention`. Keys are
        sharded over the axes that shard nothing else, and devices exchange along these alone.
      heads_axis_name: those over which N and K are sharded. Where they do not divide K, its heads are
        repeated until they do.
      query_sharded: whether queries are sharded like keys; None: where there is one or more for each
        device along the axes of the keys.
      combine: to take this one whatever it costs. 'fused' counts as 'butterfly', whose messages it sends.
      links: measured, by axis, for those of the keys: of `cost.links_from`.
      reserved_bytes: of a device's memory, for weights and all else.

    Returns:
      Plan.

    Raises:
      ValueError: axes that do not lie on the pod, are not in the mesh, or do not divide B or N; an axis
        without a link; a combine that does not fit how queries are sharded; more reserved than there is.
    """
    pod = pod_of(pod) if isinstance(pod, str) else pod
    division = divide(
        workload, pod.axes if sharding is None else sharding, batch_axis_name, heads_axis_name
    )
    topology = pod.topology(division.axes, links, division.keys)
    sharded = workload.queries >= topology.size > 1 if query_sharded is None else query_sharded
    group, sizes = division.group(workload), topology.sizes
    shape = group.shape
    choice = choose(shape, topology, query_sharded=sharded)
    forward_s = {choice.combine: choice.predicted_s, **dict(choice.alternatives)}
    if combine in UNTIMED and pod.chip.platform == "tpu" and not sharded:
        forward_s[combine] = cost.time_s(traffic(combine, shape, topology), topology)
    if combine is not None and combine not in forward_s:
        raise ValueError(
            f"combine is {combine!r}; for {workload.queries} queries, "
            f"{'sharded like keys' if sharded else 'whole on each device'}, on axes "
            f"{ {name: division.axes[name] for name in division.keys} } it must be one of "
            f"{tuple(forward_s)}: name one, or pass query_sharded={not sharded}"
        )
    # Where all devices share the cores of one process, each group waits for the others'.
    groups = pod.devices // topology.size if topology.constants.shared else 1
    local = (
        workload.layers
        * groups
        * local_s(
            shape,
            topology.size,
            pod.chip,
            query_sharded=sharded,
            processes=pod.hosts,
            training=workload.training,
        )
    )
    memory = _free(pod, reserved_bytes)

    def priced(name: str) -> Alternative:
        amounts, exchange_s = traffic(name, shape, topology), forward_s[name]
        sent = amounts.bytes_sent
        if workload.training:
            back = backward_traffic(name, shape, topology)
            exchange_s, sent = exchange_s + cost.time_s(back, topology), sent + back.bytes_sent
        held = bytes_per_device(name, group, sizes)
        return Alternative(
            combine=name,
            predicted_s=local + workload.layers * groups * exchange_s,
            bytes_per_device=held,
            bytes_sent_per_device=workload.layers * sent,
            rounds=amounts.messages,
            largest_context=memory and largest_context(name, group, sizes, memory),
            fits=memory is None or held <= memory,
        )

    def rank(x: Alternative) -> tuple[float, ...]:
        return (0, x.predicted_s) if x.fits else (1, x.bytes_per_device, x.predicted_s)

    # Sorting is stable: of equals the first, as in `choose`.
    ranking = sorted(map(priced, forward_s), key=rank)
    best = next(x for x in ranking if combine in (None, x.combine))
    others = [dataclasses.replace(x, why=_why(x, best, memory)) for x in ranking if x is not best]
    return Plan(
        workload=workload,
        topology=pod.name,
        devices=pod.devices,
        axes=division.axes,
        key_axes=division.keys,
        batch_axes=division.batch,
        heads_axes=division.heads,
        query_sharded=sharded,
        links=None if links is None else dict(links),
        reserved_bytes=reserved_bytes,
        combine=best.combine,
        axis_order=tuple(reversed(division.keys)),
        block_size=_block_size(group, pod, topology.size, sharded),
        predicted_s=best.predicted_s,
        breakdown={"local_s": local, "exchange_s": best.predicted_s - local},
        bytes_per_device=best.bytes_per_device,
        key_value_bytes_per_device=key_value_bytes(group, sizes),
        memory_bytes=memory,
        bytes_sent_per_device=best.bytes_sent_per_device,
        rounds=best.rounds,
        largest_context=best.largest_context,
        fits=best.fits,
        remedies=()
        if best.fits
        else remedies(best.combine, group, sizes, memory or 0, division.size(division.batch)),
        alternatives=tuple(others),
        reason=_reason(best, others, local, memory, pod, named=combine is not None),
    )


def _free(pod: Pod, reserved_bytes: int) -> int | None:
    """The memory of a device without what is reserved; None: not known."""
    whole = pod.hbm_bytes
    if reserved_bytes < 0 or (whole is not None and reserved_bytes >= whole):
        there = "" if whole is None else f" and a device of {pod.name} has {whole}"
        raise ValueError(
            f"reserved_bytes is {reserved_bytes}{there}; it must be 0 or more and leave something: pass "
            "what weights and all else take of one device"
        )
    return None if whole is None else whole - reserved_bytes


def _block_size(workload: Workload, pod: Pod, devices: int, query_sharded: bool) -> int:
    keys = -(-workload.context // devices)
    queries = -(-workload.queries // devices) if query_sharded else workload.queries
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
        return (
            f"does not fit: needs {bytes_text(other.bytes_per_device)} of {bytes_text(memory or 0)}"
        )
    ratio = other.predicted_s / best.predicted_s
    if not best.fits:
        return "fits; it was not named"
    if abs(ratio - 1) < 0.005:
        return "as fast, within 0.5 %"
    if ratio < 1:
        return f"faster, {ratio:.2f} of the time; it was not named"
    more = other.bytes_sent_per_device - best.bytes_sent_per_device
    rounds = other.rounds - best.rounds
    causes = []
    if more > 0:
        causes.append(f"each device sends {bytes_text(more)} more")
    if rounds > 0:
        causes.append(f"{count_text(rounds, 'more message')} to wait for in a layer")
    if "ring" in best.combine and "ring" not in other.combine:
        causes.append("it sends nothing while attention is computed")
    causes = causes or ["its launches, merges or hops take longer"]
    return f"{ratio:.3g} times as long: {', '.join(causes)}"


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
    fitting = [x for x in others if x.fits]
    if not best.fits:
        needs = f"needs {bytes_text(best.bytes_per_device)} a device of {bytes_text(memory or 0)}"
        if fitting:
            return f"does not fit: {best.combine}, named by you, {needs}, and {fitting[0].combine} fits"
        least = (
            "is the only candidate" if not others else "holds least" if not named else "was named"
        )
        longest = max(x.largest_context or 0 for x in (best, *others))
        return (
            f"does not fit, by no combine: {best.combine}, which {least}, {needs}; take more devices, or a "
            f"context of at most {longest}"
        )
    taken = "named by you" if named else "the least time"
    if not others:
        return f"{what}; {taken}, the only candidate"
    against = ", ".join(f"{x.combine} {seconds_text(x.predicted_s)}" for x in fitting)
    too_large = ", ".join(x.combine for x in others if not x.fits)
    parts = [
        f"against {against}" if against else "",
        f"{too_large} not fitting" if too_large else "",
    ]
    return f"{what}; {taken}, {'; '.join(part for part in parts if part)}"
