"""`distattn plan`: whether a step fits on a pod, what it costs, and which strategy to take."""

import argparse
import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distattn.attention.api import dot_product_attention
from distattn.cli.arguments import (
    CommandError,
    Subparsers,
    amount_at_least,
    at_least,
    axis_names,
    mesh_axes,
)
from distattn.planning.chips import CHIPS, Link
from distattn.planning.cost import FORMULAS, Workload, links_from
from distattn.planning.plan import Plan, plan
from distattn.planning.pods import FORM, Pod, pod
from distattn.planning.text import bytes_text, count_text, seconds_text, table
from distattn.testing.programs import Report, compile_for

DTYPES = {
    "f8": jnp.dtype(jnp.float8_e4m3fn),
    "bf16": jnp.dtype(jnp.bfloat16),
    "f16": jnp.dtype(jnp.float16),
    "f32": jnp.dtype(jnp.float32),
    "f64": jnp.dtype(jnp.float64),
}
# Values of arguments that were left out: None until then, to tell them from those that were given.
DEFAULTS: dict[str, Any] = {
    "batch": 1,
    "head_dim": 128,
    "layers": 1,
    "dtype": "bf16",
    "training": False,
    "causal": True,
    "reserved_bytes": 0,
}


def add(subparsers: Subparsers) -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "plan",
        help="predicts memory, traffic and time of attention on a pod of any size, without one",
        description="By formula, from data sheets: which strategy to take on a pod for one step over all "
        "layers, what each device holds and sends, how long it takes, the largest context that fits, and "
        "what the other strategies cost. It starts no device. Lengths may be written as 128k (131072) or "
        "1M (1048576).",
        epilog="exit code: 0, it fits; 1, it does not; 2, an argument is wrong",
    )
    whole, length, argument = at_least(1), amount_at_least(1), parser.add_argument
    topology = f"{FORM}; chips: {', '.join(CHIPS)}"
    argument("--topology", required=True, metavar="NAME", help=topology)
    argument("--context", type=length, required=True, metavar="S", help="keys of a sequence")
    queries = "1 for decoding, as keys for a prompt (default 1; in training, as keys)"
    argument("--queries", type=length, metavar="T", help=f"queries of a sequence: {queries}")
    argument("--batch", type=whole, metavar="B", help="sequences (default 1)")
    argument("--heads", type=whole, required=True, metavar="N", help="heads of the query")
    argument("--kv-heads", type=whole, metavar="K", help="of key and value (default: --heads)")
    argument("--head-dim", type=whole, metavar="H", help="(default 128)")
    argument("--value-dim", type=whole, metavar="V", help="of value (default: --head-dim)")
    argument("--layers", type=whole, metavar="N", help="(default 1)")
    argument("--dtype", choices=DTYPES, help="type of query, key and value (default bf16)")
    argument("--training", action="store_true", default=None, help="the backward pass too")
    causal = (
        "each query attends to its own key and those before it, half of all pairs of a prompt, shared "
        "equally (a layout such as zigzag); default yes. It changes nothing for one query"
    )
    argument("--causal", action=argparse.BooleanOptionalAction, help=causal)
    names = f"not the best, but one of {', '.join(FORMULAS)}"
    argument("--strategy", choices=FORMULAS, metavar="NAME", help=names)
    mesh = (
        "axes of the mesh, slow axis first (default: one for each dimension of the network); keys are "
        "sharded over those that shard nothing else"
    )
    argument("--mesh", type=mesh_axes, metavar="AXIS=N,...", help=mesh)
    argument("--batch-axis", type=axis_names, metavar="AXIS,...", help="mesh axes that shard B")
    argument("--heads-axis", type=axis_names, metavar="AXIS,...", help="those that shard N and K")
    measured = "take the links that distattn check --json FILE has measured along the same axes"
    argument("--check", metavar="FILE", help=measured)
    reserved = "bytes of a device's memory for weights and all else, as 4G (default 0)"
    argument("--reserved-bytes", type=amount_at_least(0), metavar="N", help=reserved)
    compiled = "compile one layer (extras tpu and cuda-aot): what the program sends and holds"
    argument("--compile", action="store_true", help=compiled)
    argument("--json", action="store_true", help="write the plan as JSON, and nothing else")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    given = {name for name, value in vars(options).items() if value is not None}
    for name in DEFAULTS.keys() - given:
        setattr(options, name, DEFAULTS[name])
    dtype = DTYPES[options.dtype]
    try:
        where = pod(options.topology)
        found = plan(
            Workload(
                batch=options.batch,
                query_length=options.queries or (options.context if options.training else 1),
                key_length=options.context,
                num_heads=options.heads,
                num_kv_heads=options.kv_heads or options.heads,
                head_dim=options.head_dim,
                value_dim=options.value_dim or options.head_dim,
                itemsize=dtype.itemsize,
                causal=options.causal,
                layers=options.layers,
                training=options.training,
            ),
            where,
            mesh=options.mesh,
            batch_axes=options.batch_axis,
            heads_axes=options.heads_axis,
            strategy=options.strategy,
            links=_measured(options.check, where),
            reserved_bytes=options.reserved_bytes,
        )
        report = compiled_layer(found, dtype) if options.compile else None
    except (ValueError, NotImplementedError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None
    if options.json:
        more = {} if report is None else {"compiled": report.as_json()}
        print(json.dumps(found.as_json() | more, indent=2, allow_nan=False))
    else:
        print(plan_text(found, options.dtype, given))
        if report is not None:
            print(f"\none layer, compiled for {report}")
    return 0 if found.fits else 1


def _measured(path: str | None, where: Pod) -> Mapping[str, Link] | None:
    if path is None:
        return None
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--check {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"--check {path}: not JSON: {error}") from None
    links = links_from(report)
    platform, several = report["platform"], report["processes"] > 1
    if platform != where.chip.platform or several != (where.hosts > 1):
        processes = "several processes" if several else "one process"
        raise CommandError(
            f"--check {path}: measured on {platform} in {processes}, and --topology {where.name} is "
            f"{where.chip.platform} of {where.hosts} host(s); measure on hosts like those"
        )
    return links


def compiled_layer(plan: Plan, dtype: jnp.dtype) -> Report:
    """Compile the attention of one layer, or its gradient in training, as a plan says.

    Lengths are rounded up to multiples of the devices.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      NotImplementedError: no compiler for the chip.
      ValueError: a topology, or a dtype, that it does not take.
    """
    # Nothing runs, and no other device is to be looked for.
    jax.config.update("jax_platforms", "cpu")
    if dtype == jnp.float64:
        jax.config.update("jax_enable_x64", True)
    w = plan.workload
    devices, heads_devices = (
        math.prod(plan.axes[name] for name in names) for names in (plan.key_axes, plan.heads_axes)
    )

    def shape(length: int, heads: int, width: int, *, sharded: bool) -> jax.ShapeDtypeStruct:
        length += -length % (devices if sharded else 1)
        return jax.ShapeDtypeStruct((w.batch, length, heads, width), dtype)

    arrays = (
        shape(w.query_length, w.num_heads, w.head_dim, sharded=plan.query_sharded),
        shape(w.key_length, w.num_kv_heads, w.head_dim, sharded=True),
        shape(w.key_length, w.num_kv_heads, w.value_dim, sharded=True),
    )
    batch, keys, heads = (
        names or None for names in (plan.batch_axes, plan.key_axes, plan.heads_axes)
    )
    query = PartitionSpec(batch, keys if plan.query_sharded else None, heads)
    # The call repeats heads of keys that do not divide.
    key = PartitionSpec(batch, keys, None if w.num_kv_heads % heads_devices else heads)
    # One query is the last and sees all keys; for several the mask is compiled, whatever their positions.
    attention = functools.partial(
        dot_product_attention, strategy=plan.strategy, is_causal=w.causal and w.query_length > 1
    )

    def loss(*arrays: jax.Array) -> Any:
        out: Any = attention(*arrays)
        return out.astype(jnp.float32).sum()

    step = jax.grad(loss, argnums=(0, 1, 2)) if w.training else attention
    return compile_for(
        step, *arrays, topology=plan.topology, mesh=plan.axes, specs=(query, key, key)
    )


# ---------------------------------------------------------------- text


def plan_text(found: Plan, dtype: str, given: Collection[str]) -> str:
    """Return the plan as paragraphs: inputs, verdict, memory, time, messages, all strategies.

    Args:
      found: the plan.
      dtype: the name of the type of query, key and value.
      given: the arguments of the command that the user gave; the others are marked as defaults.
    """
    w, named = found.workload, "strategy" in given
    keys = found.key_value_bytes_per_device
    rest = bytes_text(found.bytes_per_device - keys)
    local, exchange = (seconds_text(found.breakdown[x]) for x in ("local_s", "exchange_s"))
    passes = "forward and backward" if w.training else "forward"
    backward = "; what the backward pass needs, and gradients" if w.training else ""
    order = f", along {', then '.join(found.axis_order)}" if found.rounds else ""
    return f"""\
{_inputs(found, dtype, given)}

{_verdict(found, named=named)}

memory of a device
  keys and values  {bytes_text(keys)}, its part of all layers
  all else         {rest}: queries, results, states, and what arrives from others{backward}
  not counted      weights, and what is not attention: see --reserved-bytes

time of a step, {passes} through the attention of {count_text(w.layers, "layer")}\
{"" if found.fits else ", if it did fit"}
  attention itself  {local}: to read keys and values once, or to multiply, if longer
  exchange          {exchange}: messages and merges, but for what is hidden behind attention
  sum               {seconds_text(found.predicted_s)}

messages
  each device sends  {bytes_text(found.bytes_sent_per_device)} a step, in all layers
  it waits for       {found.rounds:,} one after another in the forward pass of a layer{order}

{_strategies(found, named=named)}"""


def _inputs(found: Plan, dtype: str, given: Collection[str]) -> str:
    w, chip = found.workload, pod(found.topology).chip

    def default(name: str, what: str = "") -> str:
        return "" if name in given else f" (default{what and f': {what}'})"

    axes = ", ".join(f"{name}={size}" for name, size in found.axes.items())
    sharded = {"keys": found.key_axes, "sequences": found.batch_axes, "heads": found.heads_axes}
    shards = ", ".join(f"{what} over {_list(names)}" for what, names in sharded.items() if names)
    queries = default("queries", "decoding" if w.query_length == 1 else "as keys")
    queries += f", {'sharded like keys' if found.query_sharded else 'not sharded'}"
    copies = math.lcm(w.num_kv_heads, math.prod(found.axes[x] for x in found.heads_axes))
    repeated = f", repeated to {copies}" if copies > w.num_kv_heads else ""
    repeated = default("kv_heads", "as queries") + repeated
    values = "" if w.value_dim == w.head_dim else f", values {w.value_dim}"
    share = w.pairs / (w.query_length * w.key_length)
    causal = ", which changes nothing for so few queries"
    if not w.causal:
        causal = ": each query attends to all keys"
    elif share <= 0.995:
        causal = f": {100 * share:.0f} % of all pairs of query and key, shared equally as by layouts.zigzag"
    links = "by data sheet (default), not measured: see --check"
    if found.links is not None:
        measured = [x for x in found.key_axes if x in found.links]
        links = f"measured along {_list(measured) or 'no axis'}"
    flops = f"{100 * chip.attained:.0f} % of the data sheet's peak, assumed and not measured"
    if chip.platform == "cpu":
        flops = f"{chip.flops_per_s:.3g} a second, of another machine than this"
    reserved = bytes_text(found.reserved_bytes)
    return f"""\
inputs
  topology  {found.topology}: {count_text(found.devices, "device")}
  mesh      {axes}{default("mesh")}; {shards}
  context   {w.key_length:,} keys of each sequence
  queries   {w.query_length:,} of each{queries}
  batch     {count_text(w.batch, "sequence")}{default("batch")}
  heads     {w.num_heads} of queries, {w.num_kv_heads} of keys and values{repeated}
  head dim  {w.head_dim}{default("head_dim")}{values}
  layers    {w.layers}{default("layers")}
  dtype     {dtype}{default("dtype")}, {count_text(w.itemsize, "byte")} a number
  training  {"yes" if w.training else "no"}{default("training")}
  causal    {"yes" if w.causal else "no"}{default("causal")}{causal}
  links     {links}
  flops     {flops}
  reserved  {reserved} a device{default("reserved_bytes")}, for weights and all else"""


def _verdict(found: Plan, *, named: bool) -> str:
    need, memory = bytes_text(found.bytes_per_device), found.memory_bytes
    if not found.fits:
        fitting = [x.strategy for x in found.alternatives if x.fits]
        least = ", which needs least" if found.alternatives else ", the only one that there is"
        lines = [
            f"verdict: IT DOES NOT FIT: a device needs {need}, and there are {bytes_text(memory or 0)}",
            f'  that is with strategy="{found.strategy}"{"" if named else least}',
            "  what would help, each by itself:",
            *(f"    {x}" for x in found.remedies),
        ]
        if fitting:
            lines.append(f"    another strategy, for these fit: {', '.join(fitting)}")
        elif not found.remedies:
            lines.append("    nothing less than another model: not even one key fits")
        return "\n".join(lines)
    room = f"not known: a device needs {need}, and how much it has is not in the table of chips"
    longest = ""
    if memory is not None:
        share = 100 * found.bytes_per_device / memory
        room = f"it fits: {need} of {bytes_text(memory)} a device, {share:.3g} %"
        longest = f"\n  the largest context that fits: {found.largest_context:,}"
    why = "as --strategy says" if named else "the least time"
    return f"""\
verdict: {room}
  strategy="{found.strategy}", {why}: {seconds_text(found.predicted_s)} a step{longest}"""


def _strategies(found: Plan, *, named: bool) -> str:
    note = "named by you" if named else "the least time" if found.fits else "needs least"
    note = f"{'taken: ' if found.fits else 'does not fit: '}{note}"
    rows = [("strategy", "a step", "memory", "sent a step", "messages", "largest context", "")]
    for x in (found, *found.alternatives):
        context = "not known" if x.largest_context is None else f"{x.largest_context:,}"
        sizes = bytes_text(x.bytes_per_device), bytes_text(x.bytes_sent_per_device)
        why = note if isinstance(x, Plan) else x.why
        rows.append(
            (x.strategy, seconds_text(x.predicted_s), *sizes, f"{x.rounds:,}", context, why)
        )
    title = (
        "all strategies; memory and bytes sent are those of one device, messages those of a layer"
    )
    return "\n".join((title, *table(rows, numbers=range(1, 6))))


def _list(names: Sequence[str]) -> str:
    """Return names as x, y and z."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
