"""A plan for a pod: whether a step fits, what it sends and costs, and which strategy to take.

By formula: nothing is compiled, and no device is needed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from distattn.planning.chips import Link
from distattn.planning.cost import (
    HEADS_SHARDED,
    QUERY_REPLICATED,
    QUERY_SHARDED,
    UNTIMED,
    Topology,
    Workload,
    backward_traffic,
    choose,
    time_s,
    traffic,
)
from distattn.planning.pods import Pod
from distattn.planning.pods import pod as pod_of
from distattn.planning.text import bytes_text

Axes = tuple[str, ...]
AxisNames = str | tuple[str, ...] | None


def as_axes(argument: str, axes: AxisNames) -> Axes:
    """Return the axes that a caller names, one, several or none, as a tuple."""
    names = axes if isinstance(axes, tuple | list) else () if axes is None else (axes,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{argument} is {axes!r}; it must be an axis name or a tuple of axis names"
        )
    return tuple(names)


# ---------------------------------------------------------------- time and memory of a device

# FlashAttention-2, arXiv 2307.08691, section 4.1: five matmuls backward for two forward.
BACKWARD = 2.5


def local_s(workload: Workload, topology: Topology, *, query_sharded: bool = False) -> float:
    """Return the seconds of a layer's attention on each device: to read, or to multiply if that is longer.

    Keys and values are read once at full bandwidth, and each device computes an equal part of the pairs at
    the rate that attention attains. The backward pass multiplies 2.5 times as much, and reads and writes
    twice.

    Args:
      workload: sizes over all devices of the topology.
      topology: the devices that the keys are sharded over.
      query_sharded: whether each device reads its part of the queries, or all.
    """
    devices, chip = topology.size, topology.constants
    rows_bytes = (workload.query_bytes + workload.out_bytes) / (devices if query_sharded else 1)
    read_s = (workload.key_value_bytes / devices + rows_bytes) * chip.devices / chip.hbm_bytes_per_s
    multiply_s = workload.flops / devices / chip.attained_flops_per_s
    seconds = max(read_s, multiply_s)
    if workload.training:
        seconds += max(2 * read_s, BACKWARD * multiply_s)
    return seconds * devices if chip.shared else seconds


def bytes_per_device(strategy: str, workload: Workload, sizes: tuple[int, ...]) -> int:
    """Return the bytes that attention holds: keys and values of all layers, and the arrays of one layer.

    A layer has query, output, states, and what arrives from other devices. Training also keeps query,
    output and log-sum-exp of all layers, and one layer's gradients in float32. Weights and other layers are
    not included.

    Args:
      strategy: its name.
      workload: one step.
      sizes: the mesh axes that shard the keys and, if the strategy needs that, the queries.
    """
    w, devices = workload, math.prod(sizes)
    keys = -(-w.key_length // devices)  # padded to as many on each device
    rows = -(-w.query_length // devices) if strategy in QUERY_SHARDED else w.query_length
    rows *= w.batch * w.num_heads
    items = rows * (w.head_dim + w.value_dim)  # query and output
    key_items = keys * w.batch * w.num_kv_heads * (w.head_dim + w.value_dim)
    arriving = key_items * _arriving_shards(strategy, w, sizes)
    total = key_value_bytes(w, sizes) + (items + arriving) * w.itemsize
    total += _state_bytes(strategy, w, rows, devices)
    if strategy in HEADS_SHARDED and devices > 1:
        total += items * w.itemsize  # rows of some heads, beside some rows of all heads
    if w.training:
        total += (w.layers - 1) * items * w.itemsize + w.layers * rows * 4
        total += (key_items + items + arriving) * 4  # a gradient of everything that is held
    return total


def key_value_bytes(workload: Workload, sizes: tuple[int, ...], scale_bytes: int = 0) -> int:
    """Return the bytes of keys and values of all layers on a device, and of scales beside each key."""
    w = workload
    per_key = w.batch * w.num_kv_heads * ((w.head_dim + w.value_dim) * w.itemsize + scale_bytes)
    return w.layers * -(-w.key_length // math.prod(sizes)) * per_key


def _state_bytes(strategy: str, w: Workload, rows: int, devices: int) -> int:
    """Return the bytes of states, and of the gathered queries that they belong to."""
    state = max(4, w.itemsize) * rows * (w.value_dim + 2)
    if devices == 1:
        return state
    if strategy == "reduce_scatter":
        # The queries and states of all rows; half of the states arrive at first.
        return devices * rows * w.head_dim * w.itemsize + devices * state + -(-devices * state // 2)
    if strategy == "all_gather":
        return (1 + devices) * state
    return 2 * state if strategy in QUERY_REPLICATED | UNTIMED else state


def _arriving_shards(strategy: str, w: Workload, sizes: tuple[int, ...]) -> int:
    """Return how many shards of one layer's keys and values a device holds beside its own."""
    devices = math.prod(sizes)
    inner = devices if strategy == "ulysses" else sizes[-1] if sizes else 1
    repeats = math.lcm(w.num_kv_heads, inner) // w.num_kv_heads  # heads are repeated to divide
    shards = {
        "gather_kv": devices,
        "ring": 2,  # the shard of this hop and the one that arrives
        "ulysses": repeats,
        "ulysses_ring": 3 * repeats,
        "ulysses_gather_kv": repeats * (1 + devices // inner),
    }
    return shards.get(strategy, 0) if devices > 1 else 0


def largest_context(strategy: str, workload: Workload, sizes: tuple[int, ...], limit: int) -> int:
    """Return the largest number of keys with `bytes_per_device` of at most `limit`; 0 if not one key fits.

    As many queries as keys grow with them.
    """
    return _largest(
        lambda keys: bytes_per_device(strategy, workload.with_keys(keys), sizes) <= limit
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, or 0 if not even 1 does; all numbers below it fit."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---------------------------------------------------------------- remedies

MOST_TIMES = 1 << 16  # more devices than this, times as many, are no advice
SCALE_BYTES = 2 * 4  # float32 scales of a quantised key and its value


def remedies(
    strategy: str, workload: Workload, sizes: tuple[int, ...], limit: int, groups: int = 1
) -> tuple[str, ...]:
    """Return changes that each let `bytes_per_device` be at most `limit`, or say that they are not enough.

    Args:
      strategy: its name.
      workload: the share of the devices that the keys are sharded over.
      sizes: the mesh axes that shard the keys.
      limit: bytes of a device.
      groups: number of groups of devices that share the sequences, each with the batch of `workload`.
    """
    w, (*slow, fast) = workload, sizes or (1,)

    def held(step: Workload) -> int:
        return bytes_per_device(strategy, step, sizes)

    def held_over(times: int) -> int:
        """Return the bytes with more devices, over which the queries are sharded if there are enough."""
        axes = (*slow, fast * times)
        sharded, name = w.query_length >= math.prod(axes), strategy
        if sharded != (strategy in QUERY_SHARDED):
            name = "ring" if sharded else "butterfly"
        return bytes_per_device(name, w, axes)

    found: list[str] = []
    if context := largest_context(strategy, w, sizes, limit):
        found.append(f"a context of at most {context:,}, the largest that fits")
    times = 2
    while times <= MOST_TIMES and held_over(times) > limit:
        times *= 2
    if times <= MOST_TIMES:
        each = bytes_text(held_over(times))
        found.append(f"{times} times as many devices for the keys, which then hold {each} each")
    if w.layers > 1 and (layers := _largest(lambda n: held(replace(w, layers=n)) <= limit)):
        found.append(f"at most {layers:,} of the {w.layers:,} layers, the others on other devices")
    if w.batch > 1 and (batch := _largest(lambda n: held(replace(w, batch=n)) <= limit)):
        found.append(f"a batch of at most {batch * groups:,}, not {w.batch * groups:,}")
    if w.itemsize > 1 and not w.training:
        quantised = key_value_bytes(replace(w, itemsize=1), sizes, SCALE_BYTES)
        left = held(w) - key_value_bytes(w, sizes) + quantised
        enough = "" if left <= limit else ", which alone is not enough"
        found.append(
            f"a KVCache of dtype int8, with which a device holds {bytes_text(left)}{enough}"
        )
    return tuple(found)


# ---------------------------------------------------------------- the plan


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A strategy, and what one step would cost with it."""

    strategy: str
    predicted_s: float  # one step: all layers
    bytes_per_device: int
    bytes_sent_per_device: float
    rounds: int  # messages of a layer's forward pass, one after another
    largest_context: int | None  # None: memory not known
    fits: bool
    why: str = ""  # why it is not taken


@dataclasses.dataclass(frozen=True)
class Plan:
    """The strategy to take, or the one that holds least if none fits, and what one step costs with it."""

    workload: Workload
    topology: str
    devices: int
    axes: dict[str, int]  # the mesh, slowest first
    key_axes: Axes  # these shard the keys, and the exchange is along them
    batch_axes: Axes
    heads_axes: Axes
    query_sharded: bool  # over the axes of the keys
    links: dict[str, Link] | None  # measured; None: those of the table of chips
    reserved_bytes: int  # bytes of a device's memory for all else
    strategy: str
    predicted_s: float  # one step, all layers: attention and exchange
    breakdown: dict[str, float]  # local_s, exchange_s: their sum is predicted_s
    bytes_per_device: int
    key_value_bytes_per_device: int  # keys and values of all layers, part of bytes_per_device
    memory_bytes: int | None  # memory of a device, without what is reserved; None: not known
    bytes_sent_per_device: float
    rounds: int  # messages of a layer's forward pass, one after another
    largest_context: int | None
    fits: bool
    remedies: tuple[str, ...]  # changes that would make it fit, each by itself
    alternatives: tuple[Alternative, ...]  # the next best first, and last those that do not fit

    @property
    def axis_order(self) -> Axes:
        """The order in which states are merged: the fastest axis first."""
        return self.key_axes[::-1]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return dataclasses.asdict(self) | {"axis_order": self.axis_order}


def plan(
    workload: Workload,
    pod: Pod | str,
    *,
    mesh: Mapping[str, int] | None = None,
    batch_axes: AxisNames = None,
    heads_axes: AxisNames = None,
    query_sharded: bool | None = None,
    strategy: str | None = None,
    links: Mapping[str, Link] | None = None,
    reserved_bytes: int = 0,
) -> Plan:
    """Return the strategy with the least predicted time, of those that fit in memory.

    The exchange is what `cost.choose` predicts, as for `strategy='auto'`, here with the links of the pod.
    The attention itself is `local_s`, the same for all. Training adds the backward pass to both.

    >>> step = Workload(16, 1, 131072, 32, 8, 128, 128, itemsize=2, layers=32)
    >>> found = plan(step, "v5e:16x16")
    >>> found.strategy, found.fits
    ('psum', True)
    >>> apart = plan(step, "v5e:16x16", batch_axes="x")
    >>> apart.key_axes, apart.bytes_sent_per_device < found.bytes_sent_per_device
    (('y',), True)

    Args:
      workload: one step.
      pod: the devices, or their name, as `pods.pod` takes it.
      mesh: sizes of the mesh axes by name, slowest first; None: one for each dimension of the network.
      batch_axes: mesh axes that shard B. The axes that shard nothing else shard the keys, and devices
        exchange along these alone.
      heads_axes: mesh axes that shard N and K. If they do not divide K, its heads are repeated until they
        do.
      query_sharded: whether queries are sharded like keys; None: if there is one or more for each device
        along the axes of the keys.
      strategy: a strategy to take whatever it costs. 'fused' counts as 'butterfly', whose messages it
        sends.
      links: measured links by axis, for the axes of the keys, as `cost.links_from` returns them.
      reserved_bytes: bytes of a device's memory for weights and all else.

    Raises:
      ValueError: sizes below 1, axes that are not on the pod or in the mesh, axes that do not divide B or
        N, an axis without a link, a strategy that does not fit the query's sharding, or more reserved than
        there is.
    """
    pod = pod_of(pod) if isinstance(pod, str) else pod
    _check_sizes(workload)
    mesh = dict(pod.axes if mesh is None else mesh)
    batch, heads = _check_axes(workload, mesh, {"batch_axes": batch_axes, "heads_axes": heads_axes})
    keys = tuple(x for x in mesh if x not in batch + heads)
    topology = pod.topology(mesh, links, keys)
    groups = math.prod(mesh[x] for x in batch)
    group, sizes = workload.of_group(groups, math.prod(mesh[x] for x in heads)), topology.sizes
    sharded = group.query_length >= topology.size > 1 if query_sharded is None else query_sharded
    choice = choose(group, topology, query_sharded=sharded)
    forward_s = {choice.strategy: choice.predicted_s, **dict(choice.alternatives)}
    if strategy in UNTIMED and pod.chip.platform == "tpu" and not sharded:
        forward_s[strategy] = time_s(traffic(strategy, group, topology), topology)
    if strategy is not None and strategy not in forward_s:
        raise ValueError(
            f"strategy is {strategy!r}; for {workload.query_length} queries, "
            f"{'sharded like keys' if sharded else 'whole on each device'}, on axes "
            f"{ {name: mesh[name] for name in keys} } it must be one of {tuple(forward_s)}: name one, "
            f"or pass query_sharded={not sharded}"
        )
    # If all devices share the cores of one process, each group waits for the others.
    steps = workload.layers * (pod.devices // topology.size if topology.constants.shared else 1)
    local = steps * local_s(group, topology, query_sharded=sharded)
    memory = _free_bytes(pod, reserved_bytes)

    def priced(name: str) -> Alternative:
        forward, exchange_s = traffic(name, group, topology), forward_s[name]
        sent = forward.bytes_sent
        if workload.training:
            back = backward_traffic(name, group, topology)
            exchange_s, sent = exchange_s + time_s(back, topology), sent + back.bytes_sent
        held = bytes_per_device(name, group, sizes)
        return Alternative(
            strategy=name,
            predicted_s=local + steps * exchange_s,
            bytes_per_device=held,
            bytes_sent_per_device=workload.layers * sent,
            rounds=forward.messages,
            largest_context=memory and largest_context(name, group, sizes, memory),
            fits=memory is None or held <= memory,
        )

    def rank(x: Alternative) -> tuple[float, ...]:
        return (0, x.predicted_s) if x.fits else (1, x.bytes_per_device, x.predicted_s)

    # Sorting is stable: the first of equals, as in `choose`.
    ranking = sorted(map(priced, forward_s), key=rank)
    best = next(x for x in ranking if strategy in (None, x.strategy))
    costs = {name: value for name, value in vars(best).items() if name != "why"}
    return Plan(
        **costs,
        workload=workload,
        topology=pod.name,
        devices=pod.devices,
        axes=mesh,
        key_axes=keys,
        batch_axes=batch,
        heads_axes=heads,
        query_sharded=sharded,
        links=None if links is None else dict(links),
        reserved_bytes=reserved_bytes,
        breakdown={"local_s": local, "exchange_s": best.predicted_s - local},
        key_value_bytes_per_device=key_value_bytes(group, sizes),
        memory_bytes=memory,
        remedies=() if best.fits else remedies(best.strategy, group, sizes, memory or 0, groups),
        alternatives=tuple(replace(x, why=_why(x, best)) for x in ranking if x is not best),
    )


def _check_sizes(w: Workload) -> None:
    for field in dataclasses.fields(w):
        size = getattr(w, field.name)
        if not isinstance(size, bool) and not (size == int(size) and size >= 1):
            raise ValueError(
                f"{field.name} is {size!r}; it must be a whole number, 1 or more: pass the size of one step"
            )
    if w.num_heads % w.num_kv_heads:
        raise ValueError(
            f"num_heads is {w.num_heads} and num_kv_heads is {w.num_kv_heads}; num_heads must be a "
            "multiple: pass the heads of the whole model, not of a device"
        )


def _check_axes(w: Workload, mesh: dict[str, int], named: dict[str, AxisNames]) -> tuple[Axes, ...]:
    """Return the axes of batch and of heads, in the order of the mesh."""
    seen: dict[str, str] = {}
    found: list[Axes] = []
    for (argument, given), size in zip(named.items(), (w.batch, w.num_heads), strict=True):
        names = as_axes(argument, given)
        for name in names:
            if name not in mesh:
                raise ValueError(
                    f"{argument} is {names}, and {name!r} is no axis of the mesh {mesh}; "
                    "name one of these, or pass a mesh that has it"
                )
            if name in seen:
                raise ValueError(
                    f"{argument} is {names}, and {name!r} is in {seen[name]} already; an axis shards "
                    "one thing: name it once"
                )
            seen[name] = argument
        devices = math.prod(mesh[name] for name in names)
        if size % devices:
            raise ValueError(
                f"{argument} is {names}, {devices} devices, which must divide the {size} "
                f"{'sequences' if argument == 'batch_axes' else 'heads'}: pass a multiple of {devices}, "
                "or axes of fewer devices"
            )
        found.append(tuple(x for x in mesh if x in names))
    return tuple(found)


def _free_bytes(pod: Pod, reserved_bytes: int) -> int | None:
    """Return the memory of a device without what is reserved, or None if it is not known."""
    whole = pod.hbm_bytes
    if reserved_bytes < 0 or (whole is not None and reserved_bytes >= whole):
        there = "" if whole is None else f" and a device of {pod.name} has {whole}"
        raise ValueError(
            f"reserved_bytes is {reserved_bytes}{there}; it must be 0 or more and leave something: pass "
            "what weights and all else take of one device"
        )
    return None if whole is None else whole - reserved_bytes


def _why(other: Alternative, best: Alternative) -> str:
    ratio = other.predicted_s / best.predicted_s
    if not other.fits:
        return "does not fit"
    if not best.fits:
        return "fits; not named"
    if abs(ratio - 1) < 0.005:
        return "as fast, within 0.5 %"
    return f"{ratio:.3g} times as long" if ratio > 1 else f"{ratio:.2f} of the time; not named"
