"""What is to be computed: one step of a model's attention, over all of its layers.

What each axis of a mesh divides: keys, sequences or heads.

The seconds of attention itself on one device: what it reads from memory, or what it multiplies.

The memory of a device that attention takes, in whole bytes; and the largest context that fits.

What would make a step fit that does not: less of one thing, or more devices, in numbers.

What the backward pass of a strategy makes the busiest device send, by formula.

A plan for a pod: does it fit, what does it send, what will it cost, which strategy, and why.

By formula: nothing is compiled, and no device is needed.

Which axes of a mesh shard which dimension of a call's arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distattn.planning import cost
from distattn.planning.chips import Chip, Link, block_sizes, even, is_flat
from distattn.planning.cost import (
    QUERY_SHARDED,
    UNTIMED,
    Shape,
    Topology,
    Traffic,
    choose,
    gather_traffic,
    sum_traffic,
    traffic,
)
from distattn.planning.pods import Pod
from distattn.planning.pods import pod as pod_of
from distattn.planning.text import bytes_text, count_text, seconds_text


@dataclasses.dataclass(frozen=True)
class Workload:
    """The attention of one step: a token decoded, a prompt read, or forward and backward of training.

    Args:
      context: keys of a sequence, over all devices.
      queries: of a sequence: 1 for decoding, `context` for a prompt or training.
      batch: sequences.
      heads: of the query.
      kv_heads: of key and value; `heads` is a multiple.
      head_dim: of query and key.
      value_dim: of value; None: head_dim.
      layers: of the model.
      dtype_bytes: of an item of query, key and value.
      training: the backward pass too.
      causal: each query attends to its own key and those before it, as in a language model; the queries
        are the last of the sequence. Keys are supposed to lie so that all devices have the same work, as
        `layouts.zigzag` has them. With T = S that is half of the products, and of one query it is all.
    """

    context: int
    queries: int = 1
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    value_dim: int | None = None
    layers: int = 1
    dtype_bytes: int = 2
    training: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        """Check the sizes."""
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name in ("training", "causal") or size is None:
                continue
            if not (size == int(size) and size >= 1):
                raise ValueError(
                    f"{field.name} is {size!r}; it must be a whole number, 1 or more: pass what one "
                    "step has"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads} and kv_heads is {self.kv_heads}; heads must be a multiple: pass "
                "the heads of the whole model, not of a device"
            )

    @property
    def values(self) -> int:
        """V."""
        return self.value_dim or self.head_dim

    @property
    def shape(self) -> Shape:
        """Of the call of one layer."""
        return Shape(
            batch=self.batch,
            query_length=self.queries,
            key_length=self.context,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.values,
            itemsize=self.dtype_bytes,
            causal=self.causal,
        )

    def of_group(self, batch: int, heads: int) -> "Workload":
        """What is left for each group of devices where so many divide sequences, and so many heads.

        Where heads of key and value do not divide, they are repeated until they do, as in a call.
        """
        return dataclasses.replace(
            self,
            batch=self.batch // batch,
            heads=self.heads // heads,
            kv_heads=math.lcm(self.kv_heads, heads) // heads,
        )

    def with_context(self, context: int) -> "Workload":
        """The same over another context; where there are as many queries, those change with it."""
        queries = context if self.queries == self.context > 1 else self.queries
        return dataclasses.replace(self, context=context, queries=queries)


Axes = tuple[str, ...]
AxisNames = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Division:
    """The axes of a mesh, each in one of three parts, in the order of the mesh."""

    axes: dict[str, int]  # all, slowest first
    keys: Axes
    batch: Axes
    heads: Axes

    def size(self, names: Axes) -> int:
        """Devices along the axes."""
        return math.prod(self.axes[name] for name in names)

    def group(self, workload: Workload) -> Workload:
        """What the devices along the axes of the keys have to share."""
        return workload.of_group(self.size(self.batch), self.size(self.heads))


def divide(
    workload: Workload,
    axes: Mapping[str, int],
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
) -> Division:
    """The axes of the keys are those that divide nothing else.

    >>> divide(Workload(4096, batch=8), {"data": 4, "sp": 2}, "data").keys
    ('sp',)

    Args:
      workload: of which B and N are to be divided.
      axes: of the mesh, slowest first.
      batch_axis_name: axes over which sequences are divided.
      heads_axis_name: axes over which heads are, of query, key and value.

    Raises:
      ValueError: an axis that is not there, or is named twice; B or N that the devices do not divide.
    """
    named = {
        "batch_axis_name": as_axes("batch_axis_name", batch_axis_name),
        "heads_axis_name": as_axes("heads_axis_name", heads_axis_name),
    }
    seen: dict[str, str] = {}
    for argument, names in named.items():
        for name in names:
            if name not in axes:
                raise ValueError(
                    f"{argument} is {names}, and {name!r} is no axis of the mesh {dict(axes)}; name one "
                    "of these, or pass a mesh that has it"
                )
            if name in seen:
                raise ValueError(
                    f"{argument} is {names}, and {name!r} is in {seen[name]} already; an axis divides "
                    "one thing: name it once"
                )
            seen[name] = argument
    batch, heads = (tuple(x for x in axes if x in names) for names in named.values())
    found = Division(dict(axes), tuple(x for x in axes if x not in seen), batch, heads)
    for (argument, names), size in zip(
        named.items(), (workload.batch, workload.heads), strict=True
    ):
        devices = found.size(names)
        if size % devices:
            what = "batch" if argument == "batch_axis_name" else "heads"
            raise ValueError(
                f"{argument} is {names}, {devices} devices, and {what} is {size}; they must divide it: "
                f"pass a multiple of {devices}, or axes of fewer devices"
            )
    return found


def as_axes(argument: str, axes: AxisNames) -> Axes:
    """The axes that a caller names: one, several or none, as a tuple."""
    names = axes if isinstance(axes, tuple | list) else () if axes is None else (axes,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{argument} is {axes!r}; it must be an axis name or a tuple of axis names"
        )
    return tuple(names)


# FlashAttention-2, arXiv 2307.08691, section 4.1: the backward pass has five products for two, so 2.5
# times the operations.
BACKWARD = 2.5


def local_s(
    shape: Shape,
    devices: int,
    chip: Chip,
    *,
    query_sharded: bool = False,
    processes: int = 1,
    training: bool = False,
) -> float:
    """Seconds of a call's products and reads on each device: the longer of the two.

    Keys and values are read once, which holds for one query and, in blocks, nearly so for many; each
    device multiplies its equal part of the pairs, which a causal mask halves where T = S. Memory at its
    full bandwidth, products at the rate that attention attains. The backward pass multiplies 2.5 times as
    much, and reads and writes twice.

    Args:
      shape: sizes over all of these devices.
      devices: over which keys, or keys and queries, are sharded.
      chip: what they are.
      query_sharded: whether each reads its part of the queries, or all.
      processes: of the job; the devices of one process on a CPU share its cores.
      training: the backward pass too.
    """
    rows_bytes = (shape.query_bytes + shape.out_bytes) / (devices if query_sharded else 1)
    read_s = (shape.key_value_bytes / devices + rows_bytes) * chip.devices / chip.hbm_bytes_per_s
    multiply_s = shape.flops / devices / chip.attained_flops_per_s
    seconds = max(read_s, multiply_s)
    if training:
        seconds += max(2 * read_s, BACKWARD * multiply_s)
    return seconds * devices if chip.shared and processes == 1 else seconds


def bytes_per_device(strategy: str, workload: Workload, sizes: tuple[int, ...]) -> int:
    """Keys and values of all layers, and for one layer query, output, states and what is gathered.

    Weights and all other layers of the model are not in it. In training query, output and log-sum-exp of
    all layers stay too, and one layer's gradients, in float32.

    Args:
      strategy: by name.
      workload: one step.
      sizes: of the mesh axes over which keys (and, as the strategy needs it, queries) are sharded.
    """
    devices, w = math.prod(sizes), workload
    keys = _shard(w, devices)
    rows = -(-w.queries // devices) if strategy in QUERY_SHARDED else w.queries
    each_row = w.batch * w.heads
    row_bytes = each_row * (w.head_dim + w.values) * w.dtype_bytes  # query and output
    total = key_value_bytes(w, sizes) + rows * row_bytes
    total += _exchanged(strategy, w, sizes, keys, rows, w.dtype_bytes)
    if w.training:
        total += (w.layers - 1) * rows * row_bytes + w.layers * rows * each_row * 4
        # What is held of keys and values, and of the rows, is held of their gradients.
        total += keys * _key_bytes(w, 4) + rows * each_row * (w.head_dim + w.values) * 4
        total += _keys_held(strategy, w, sizes, keys, 4)
    return total


def key_value_bytes(workload: Workload, sizes: tuple[int, ...], key_overhead: int = 0) -> int:
    """Keys and values of all layers on a device, and so many bytes beside each: those of scales."""
    w = workload
    each = _key_bytes(w, w.dtype_bytes) + w.batch * w.kv_heads * key_overhead
    return w.layers * _shard(w, math.prod(sizes)) * each


def largest_context(strategy: str, workload: Workload, sizes: tuple[int, ...], limit: int) -> int:
    """The largest context with `bytes_per_device` of at most `limit`; 0 where not even one key fits.

    All else stays as it is, but for as many queries as keys, which grow with them.
    """

    def fits(context: int) -> bool:
        return bytes_per_device(strategy, workload.with_context(context), sizes) <= limit

    return largest(fits)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number for which it holds, and 0 if not even for 1; it holds for all below that."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _shard(w: Workload, devices: int) -> int:
    """Keys of a device, padded to as many on each."""
    return -(-w.context // devices)


def _key_bytes(w: Workload, itemsize: int) -> int:
    """Key and value of one position, for all sequences."""
    return w.batch * w.kv_heads * (w.head_dim + w.values) * itemsize


def _exchanged(
    strategy: str, w: Workload, sizes: tuple[int, ...], keys: int, rows: int, itemsize: int
) -> int:
    """States, and what arrives from others."""
    devices = math.prod(sizes)
    state = max(4, w.dtype_bytes) * rows * w.batch * w.heads * (w.values + 2)
    if devices == 1:
        return state
    if strategy in ("butterfly", "psum", "fused"):
        return 2 * state  # one's own, and one that arrives or is summed
    if strategy == "all_gather":
        return (1 + devices) * state
    # Of all rows: queries and states, of which half arrive at first.
    if strategy == "reduce_scatter":
        queries = devices * rows * w.batch * w.heads * w.head_dim * w.dtype_bytes
        return queries + devices * state + -(-devices * state // 2)
    held = state + _keys_held(strategy, w, sizes, keys, itemsize)
    if strategy.startswith("ulysses"):  # rows of some heads, beside some rows of all heads
        held += rows * w.batch * w.heads * (w.head_dim + w.values) * w.dtype_bytes
    return held


def _keys_held(strategy: str, w: Workload, sizes: tuple[int, ...], keys: int, itemsize: int) -> int:
    """Keys and values of others, of one layer."""
    devices = math.prod(sizes)
    shard = keys * _key_bytes(w, itemsize)
    if devices == 1 or strategy not in QUERY_SHARDED or strategy == "reduce_scatter":
        return 0
    if strategy == "gather_kv":
        return devices * shard
    if strategy == "ring":
        return 2 * shard  # what is worked on, and what arrives
    inner = devices if strategy == "ulysses" else sizes[-1]
    own = shard * (math.lcm(w.kv_heads, inner) // w.kv_heads)  # heads are repeated to divide
    if strategy == "ulysses_ring":
        return 3 * own
    if strategy == "ulysses_gather_kv":
        return own + own * (devices // inner)
    return own


# More devices than this, times as many, are no advice.
MOST_TIMES = 1 << 16
SCALE_BYTES = 2 * 4  # of a quantised key and of its value, in float32


def remedies(
    strategy: str, workload: Workload, sizes: tuple[int, ...], limit: int, groups: int = 1
) -> tuple[str, ...]:
    """Each by itself lets `bytes_per_device` be at most `limit`, but for one that says that it does not.

    Args:
      strategy: by name.
      workload: of the devices that share the keys: see `division`.
      sizes: of the axes over which they are sharded.
      limit: bytes of a device.
      groups: over which sequences are divided, each of the batch of `workload`.
    """
    w, (*slow, fast) = workload, sizes or (1,)

    def held(step: Workload) -> int:
        return bytes_per_device(strategy, step, sizes)

    def held_over(times: int) -> int:
        """With so many times the devices, over which queries may be sharded then, or no longer."""
        axes = (*slow, fast * times)
        sharded, name = w.queries >= math.prod(axes), strategy
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
    if w.layers > 1 and (layers := largest(lambda n: held(replace(w, layers=n)) <= limit)):
        found.append(
            f"at most {layers:,} of the {w.layers:,} layers, and the others on other devices"
        )
    if w.batch > 1 and (batch := largest(lambda n: held(replace(w, batch=n)) <= limit)):
        found.append(f"a batch of at most {batch * groups:,}, not {w.batch * groups:,}")
    if w.dtype_bytes > 1 and not w.training:
        small = replace(w, dtype_bytes=1)
        saved = key_value_bytes(w, sizes) - key_value_bytes(small, sizes, SCALE_BYTES)
        enough = "" if held(w) - saved <= limit else ", which alone is not enough"
        found.append(
            f"a KVCache of dtype int8, with which a device holds {bytes_text(held(w) - saved)}{enough}"
        )
    return tuple(found)


def backward_traffic(strategy: str, shape: Shape, topology: Topology) -> Traffic:
    """What the backward pass of a strategy exchanges: what the forward pass gathered, and gradients of it.

    The gradient of a whole query is summed over the devices; those of keys and values stay where they
    are, or go back by the way that these came, in float32.
    """
    if topology.size == 1:
        return Traffic()
    wide = dataclasses.replace(shape, itemsize=max(4, shape.itemsize))
    if strategy not in QUERY_SHARDED:
        names = ("psum", "butterfly")
        sums = [sum_traffic(name, wide.query_bytes, topology) for name in names]
        return min(sums, key=lambda x: cost.time_s(x, topology))
    if strategy == "reduce_scatter":
        rows = shape.query_bytes + wide.out_bytes  # queries, and cotangents of their results
        return gather_traffic(rows, topology) + gather_traffic(wide.query_bytes, topology)
    return traffic(strategy, shape, topology) + traffic(strategy, wide, topology)


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A strategy, and what it would cost."""

    strategy: str
    predicted_s: float  # one step: all layers
    bytes_per_device: int
    bytes_sent_per_device: float
    rounds: int  # messages of a layer's forward pass, one after another
    largest_context: int | None  # None: memory not known
    fits: bool
    why: str = ""  # it is not taken


@dataclasses.dataclass(frozen=True)
class Plan:
    """The strategy to take, or where none fits the one that holds least, and what one step costs with it."""

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
    strategy: str
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
    strategy: str | None = None,
    links: Mapping[str, Link] | None = None,
    reserved_bytes: int = 0,
) -> Plan:
    """The strategy with the least predicted time, of those that fit in memory.

    The exchange is what `planner.choose` predicts, as for `strategy='auto'`, here with the links of the
    pod; the attention itself is `roofline.local_s`, the same for all. In training the backward pass is
    added to both.

    >>> found = plan(Workload(131072, batch=16, layers=32), "v5e:16x16")
    >>> found.strategy, found.fits
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
      strategy: to take this one whatever it costs. 'fused' counts as 'butterfly', whose messages it sends.
      links: measured, by axis, for those of the keys: of `cost.links_from`.
      reserved_bytes: of a device's memory, for weights and all else.

    Returns:
      Plan.

    Raises:
      ValueError: axes that do not lie on the pod, are not in the mesh, or do not divide B or N; an axis
        without a link; a strategy that does not fit how queries are sharded; more reserved than there is.
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
    forward_s = {choice.strategy: choice.predicted_s, **dict(choice.alternatives)}
    if strategy in UNTIMED and pod.chip.platform == "tpu" and not sharded:
        forward_s[strategy] = cost.time_s(traffic(strategy, shape, topology), topology)
    if strategy is not None and strategy not in forward_s:
        raise ValueError(
            f"strategy is {strategy!r}; for {workload.queries} queries, "
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
            strategy=name,
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
    best = next(x for x in ranking if strategy in (None, x.strategy))
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
        strategy=best.strategy,
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
        else remedies(best.strategy, group, sizes, memory or 0, division.size(division.batch)),
        alternatives=tuple(others),
        reason=_reason(best, others, local, memory, pod, named=strategy is not None),
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
    if "ring" in best.strategy and "ring" not in other.strategy:
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
        f"{best.strategy} on {pod.name}, {pod.devices} devices: {seconds_text(best.predicted_s)} a step, "
        f"of which {seconds_text(local)} for attention itself and {seconds_text(exchange)} for the exchange"
    )
    fitting = [x for x in others if x.fits]
    if not best.fits:
        needs = f"needs {bytes_text(best.bytes_per_device)} a device of {bytes_text(memory or 0)}"
        if fitting:
            return f"does not fit: {best.strategy}, named by you, {needs}, and {fitting[0].strategy} fits"
        least = (
            "is the only candidate" if not others else "holds least" if not named else "was named"
        )
        longest = max(x.largest_context or 0 for x in (best, *others))
        return (
            f"does not fit, by no strategy: {best.strategy}, which {least}, {needs}; take more devices, or a "
            f"context of at most {longest}"
        )
    taken = "named by you" if named else "the least time"
    if not others:
        return f"{what}; {taken}, the only candidate"
    against = ", ".join(f"{x.strategy} {seconds_text(x.predicted_s)}" for x in fitting)
    too_large = ", ".join(x.strategy for x in others if not x.fits)
    parts = [
        f"against {against}" if against else "",
        f"{too_large} not fitting" if too_large else "",
    ]
    return f"{what}; {taken}, {'; '.join(part for part in parts if part)}"
