"""A plan as text: what it rests on, whether it fits, memory, time, messages, and the other strategies."""

import math
from collections.abc import Collection, Iterable, Sequence

from distattn.planning.plan import Plan
from distattn.planning.pods import pod
from distattn.planning.text import bytes_text, count_text, seconds_text

Rows = Sequence[tuple[str, ...]]


def plan_text(found: Plan, dtype: str, given: Collection[str]) -> str:
    """Short paragraphs, in the order in which they are asked for.

    Args:
      found: the plan.
      dtype: of its workload, by name.
      given: the arguments of the command that the user gave; the others are marked as defaults.
    """
    blocks = [
        _block("inputs", _inputs(found, dtype, given)),
        _verdict(found, named="strategy" in given),
        _block("memory of a device", _memory(found)),
        _block(f"time of a step, {_step(found)}", _time(found)),
        _block("messages and blocks", _messages(found)),
        _alternatives(found, named="strategy" in given),
    ]
    return "\n\n".join(blocks)


def _inputs(found: Plan, dtype: str, given: Collection[str]) -> Rows:
    w = found.workload

    def default(name: str) -> str:
        return "" if name in given else " (default)"

    axes = ", ".join(f"{name}={size}" for name, size in found.axes.items())
    shards = ", ".join(
        f"{what} over {_list(names)}"
        for what, names in (
            ("keys", found.key_axes),
            ("sequences", found.batch_axes),
            ("heads", found.heads_axes),
        )
        if names
    )
    where = "sharded like keys" if found.query_sharded else "not sharded"
    copies = math.lcm(w.kv_heads, math.prod(found.axes[x] for x in found.heads_axes))
    repeated = f", repeated to {copies}" if copies > w.kv_heads else ""
    decoding = " (default: decoding)" if w.queries == 1 else " (default: as keys)"
    groups = "" if "kv_heads" in given else " (default: as queries)"
    values = "" if w.values == w.head_dim else f", values {w.values}"
    reserved = bytes_text(found.reserved_bytes)
    measured = tuple(x for x in found.key_axes if x in (found.links or {}))
    return [
        ("topology", f"{found.topology}: {count_text(found.devices, 'device')}"),
        ("mesh", f"{axes}{default('mesh')}; {shards}"),
        ("context", f"{w.context:,} keys of each sequence"),
        ("queries", f"{w.queries:,} of each{'' if 'queries' in given else decoding}, {where}"),
        ("batch", f"{count_text(w.batch, 'sequence')}{default('batch')}"),
        ("heads", f"{w.heads} of queries, {w.kv_heads} of keys and values{groups}{repeated}"),
        ("head dim", f"{w.head_dim}{default('head_dim')}{values}"),
        ("layers", f"{w.layers}{default('layers')}"),
        ("dtype", f"{dtype}{default('dtype')}, {count_text(w.dtype_bytes, 'byte')} a number"),
        ("training", f"{'yes' if w.training else 'no'}{default('training')}"),
        ("causal", f"{'yes' if w.causal else 'no'}{default('causal')}{_masked(found)}"),
        (
            "links",
            "by data sheet (default), not measured: see --check"
            if found.links is None
            else f"measured along {_list(measured) or 'no axis'}",
        ),
        ("products", _products(found)),
        ("reserved", f"{reserved} a device{default('reserved_bytes')}, for weights and all else"),
    ]


def _products(found: Plan) -> str:
    chip = pod(found.topology).chip
    if chip.platform == "cpu":
        return f"at {chip.flops_per_s:.3g} flops a second, of another machine than this"
    share = f"{100 * chip.attained:.0f} % of the data sheet's peak"
    return f"at {share}, counted on and not measured"


def _masked(found: Plan) -> str:
    w = found.workload
    if not w.causal:
        return ": each query attends to all keys"
    share = w.shape.pairs / (w.queries * w.context)
    if share > 0.995:
        return ", which changes nothing for so few queries"
    return (
        f": {100 * share:.0f} % of all pairs of query and key, in an order such as "
        "layouts.zigzag, in which all devices have as many"
    )


def _verdict(found: Plan, *, named: bool) -> str:
    need = bytes_text(found.bytes_per_device)
    if found.memory_bytes is None:
        room = f"not known: a device needs {need}, and how much it has is not in the table of chips"
    elif found.fits:
        share = found.bytes_per_device / found.memory_bytes
        room = f"it fits: {need} of {bytes_text(found.memory_bytes)} a device, {100 * share:.3g} %"
    else:
        return _does_not_fit(found, named=named)
    why = "as --strategy says" if named else "the least time"
    lines = [
        f"verdict: {room}",
        f'  strategy="{found.strategy}", {why}: {seconds_text(found.predicted_s)} a step',
    ]
    if found.largest_context is not None:
        lines.append(f"  the largest context that fits: {found.largest_context:,}")
    return "\n".join(lines)


def _does_not_fit(found: Plan, *, named: bool) -> str:
    fitting = [x.strategy for x in found.alternatives if x.fits]
    whose = f'with strategy="{found.strategy}"'
    if not named:
        whose += ", which needs least" if found.alternatives else ", the only one that there is"
    lines = [
        f"verdict: IT DOES NOT FIT: a device needs {bytes_text(found.bytes_per_device)}, and there are "
        f"{bytes_text(found.memory_bytes or 0)}",
        f"  that is {whose}",
        "  what would help, each by itself:",
    ]
    lines += [f"    {x}" for x in found.remedies]
    if fitting:
        lines.append(f"    another strategy, for these fit: {', '.join(fitting)}")
    elif not found.remedies:
        lines.append("    nothing less than another model: not even one key fits")
    return "\n".join(lines)


def _memory(found: Plan) -> Rows:
    held, keys = found.bytes_per_device, found.key_value_bytes_per_device
    what = "queries, results, states, and what arrives from others"
    if found.workload.training:
        what += "; what the backward pass needs, and gradients"
    return [
        ("keys and values", f"{bytes_text(keys)}, its part of all layers"),
        ("all else", f"{bytes_text(held - keys)}: {what}"),
        ("not counted", "weights, and what is not attention: see --reserved-bytes"),
    ]


def _step(found: Plan) -> str:
    passes = "forward and backward" if found.workload.training else "forward"
    layers = count_text(found.workload.layers, "layer")
    return f"{passes} through the attention of {layers}{'' if found.fits else ', if it did fit'}"


def _time(found: Plan) -> Rows:
    times = {name: seconds_text(s) for name, s in found.breakdown.items()}
    return [
        (
            "attention itself",
            f"{times['local_s']}: to read keys and values once, or to multiply, if longer",
        ),
        (
            "exchange",
            f"{times['exchange_s']}: messages and merges, but for what is hidden behind attention",
        ),
        ("sum", seconds_text(found.predicted_s)),
    ]


def _messages(found: Plan) -> Rows:
    along = ", then ".join(found.axis_order)
    hops = f"{found.rounds:,} one after another in the forward pass of a layer"
    keys = -(-found.workload.context // math.prod(found.axes[x] for x in found.key_axes))
    return [
        ("each device sends", f"{bytes_text(found.bytes_sent_per_device)} a step, in all layers"),
        ("it waits for", f"{hops}{f', along {along}' if found.rounds else ''}"),
        (
            "it attends to",
            f"{found.block_size:,} keys at a time, a size that distattn chose, and holds {keys:,}",
        ),
    ]


def _alternatives(found: Plan, *, named: bool) -> str:
    header = (
        "strategy",
        "a step",
        "memory",
        "sent a step",
        "messages a layer",
        "largest context",
        "",
    )
    rows = [header]
    for x in (found, *found.alternatives):
        if isinstance(x, Plan):
            note = "named by you" if named else "the least time" if x.fits else "needs least"
            note = f"{'taken: ' if x.fits else 'does not fit: '}{note}"
        else:
            note = x.why
        context = "not known" if x.largest_context is None else f"{x.largest_context:,}"
        amounts = (seconds_text(x.predicted_s), bytes_text(x.bytes_per_device))
        sent = bytes_text(x.bytes_sent_per_device)
        rows.append((x.strategy, *amounts, sent, f"{x.rounds:,}", context, note))
    return "\n".join(
        ("all strategies; memory and bytes sent are those of one device", *_aligned(rows))
    )


def _aligned(rows: Rows) -> Iterable[str]:
    """The cells under each other, all but the first and the last to the right."""
    last = len(rows[0]) - 1
    widths = [max(len(row[k]) for row in rows) for k in range(last + 1)]
    for row in rows:
        cells = (
            cell.ljust(size) if k in (0, last) else cell.rjust(size)
            for k, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        yield f"  {'  '.join(cells)}".rstrip()


def _block(title: str, rows: Rows) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join((title, *(f"  {name.ljust(width)}  {fact}" for name, fact in rows)))


def _list(names: tuple[str, ...]) -> str:
    """x, y and z."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
