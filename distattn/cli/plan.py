"""`distattn plan`: does it fit on a pod, what will it cost, which combine; without any device."""

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from distattn.amounts import bytes_text, seconds_text
from distattn.chips import CHIPS
from distattn.cli.arguments import CommandError, Subparsers, at_least, mesh_axes
from distattn.cli.compiled import compiled_layer
from distattn.cli.picture import draw
from distattn.cost import Link, links_from
from distattn.plan import Plan, plan
from distattn.pods import FORM, Pod, pod
from distattn.traffic import FORMULAS
from distattn.workload import Workload

SUFFIXES = (".svg", ".png", ".pdf")
DTYPES = {
    "f8": jnp.dtype(jnp.float8_e4m3fn),
    "bf16": jnp.dtype(jnp.bfloat16),
    "f16": jnp.dtype(jnp.float16),
    "f32": jnp.dtype(jnp.float32),
    "f64": jnp.dtype(jnp.float64),
}


def add(subparsers: Subparsers) -> None:
    """The command and its arguments."""
    parser = subparsers.add_parser(
        "plan",
        help="predicts memory, traffic and time of attention on a pod of any size, without one",
        description="By formula, from data sheets: which combine to take on a pod for one step over all "
        "layers, what each device holds and sends, how long it takes, the largest context that fits, and "
        "why the other combines lose. It starts no device.",
    )
    whole, argument = at_least(1), parser.add_argument
    argument(
        "--topology",
        required=True,
        metavar="NAME",
        help=f"{FORM}; chips: {', '.join(CHIPS)}",
    )
    argument("--context", type=whole, required=True, metavar="S", help="keys of a sequence")
    argument(
        "--queries", type=whole, metavar="T", help="of a sequence (default 1; in training, as keys)"
    )
    argument("--batch", type=whole, default=1, metavar="B", help="sequences (default %(default)s)")
    argument("--heads", type=whole, required=True, metavar="N", help="of the query")
    argument("--kv-heads", type=whole, metavar="K", help="of key and value (default: --heads)")
    argument("--head-dim", type=whole, default=128, metavar="H", help="(default %(default)s)")
    argument("--value-dim", type=whole, metavar="V", help="of value (default: --head-dim)")
    argument("--layers", type=whole, default=1, metavar="N", help="(default %(default)s)")
    argument(
        "--dtype", choices=DTYPES, default="bf16", help="of key and value (default %(default)s)"
    )
    argument("--training", action="store_true", help="the backward pass too")
    argument(
        "--combine",
        choices=FORMULAS,
        metavar="NAME",
        help=f"not the best, but one of {', '.join(FORMULAS)}",
    )
    argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXIS=N,...",
        help="axes that shard the keys, slow axis first (default: one for each dimension of the network)",
    )
    argument(
        "--check",
        metavar="FILE",
        help="take the links that distattn check --json FILE has measured along the same axes",
    )
    argument(
        "--reserved-bytes",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of a device's memory, for weights and all else (default %(default)s)",
    )
    argument(
        "--compile",
        action="store_true",
        help="one layer, by the real compiler (extras tpu and cuda-aot): what the program sends and holds",
    )
    argument(
        "--plot",
        type=_picture,
        metavar="FILE",
        help="draw time against context and devices, and who sends to whom, as .svg, .png or .pdf",
    )
    argument(
        "--json", action="store_true", help="write the plan as JSON, and nothing else on stdout"
    )
    parser.set_defaults(run=_run)


def _picture(value: str) -> Path:
    if Path(value).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{value!r} does not end in one of {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return Path(value)


def _run(options: argparse.Namespace) -> None:
    dtype = DTYPES[options.dtype]
    queries = options.queries or (options.context if options.training else 1)
    try:
        where = pod(options.topology)
        links = _measured(options.check, where)
        workload = Workload(
            context=options.context,
            queries=queries,
            batch=options.batch,
            heads=options.heads,
            kv_heads=options.kv_heads or options.heads,
            head_dim=options.head_dim,
            value_dim=options.value_dim,
            layers=options.layers,
            dtype_bytes=dtype.itemsize,
            training=options.training,
        )
        found = plan(
            workload,
            where,
            sharding=options.mesh,
            combine=options.combine,
            links=links,
            reserved_bytes=options.reserved_bytes,
        )
        report = compiled_layer(found, workload, dtype) if options.compile else None
        if options.plot:
            draw(found, workload, where, options.plot, links=links)
    except (ValueError, NotImplementedError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"--plot {options.plot}: {error.strerror}") from None
    if options.json:
        more = {} if report is None else {"compiled": report.as_json()}
        print(json.dumps(found.as_json() | more, indent=2, allow_nan=False))
    else:
        print(_text(found))
        if report is not None:
            print(f"\none layer, compiled for {report}")


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


def _text(found: Plan) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in found.axes.items())
    queries = "sharded like keys" if found.query_sharded else "whole on each device"
    share = "" if found.memory_bytes is None else f" of {bytes_text(found.memory_bytes)}"
    fits = "" if found.fits else ", DOES NOT FIT"
    times = {name: seconds_text(s) for name, s in found.breakdown.items()}
    facts = {
        "topology": f"{found.topology}, {found.devices} devices ({axes})",
        "queries": queries,
        "combine": f"{found.combine}, over {', then '.join(found.axis_order)}",
        "a step": f"{seconds_text(found.predicted_s)} (attention {times['local_s']}, exchange "
        f"{times['exchange_s']})",
        "memory a device": f"{bytes_text(found.bytes_per_device)}{share}{fits}",
        "sent by a device": f"{bytes_text(found.bytes_sent_per_device)} a step",
        "rounds a layer": str(found.rounds),
        "keys of a block": str(found.block_size),
        "largest context": _number(found.largest_context),
    }
    width = max(map(len, facts))
    lines = [f"{name.ljust(width)}  {fact}" for name, fact in facts.items()]
    header = ("combine", "a step", "memory", "sent", "rounds", "largest context", "")
    rows = [header]
    for x in (found, *found.alternatives):
        amounts = seconds_text(x.predicted_s), bytes_text(x.bytes_per_device)
        sent = bytes_text(x.bytes_sent_per_device)
        why = "taken" if isinstance(x, Plan) else x.why
        rows.append((x.combine, *amounts, sent, str(x.rounds), _number(x.largest_context), why))
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    table = (
        "  ".join(
            cell.ljust(size) if k in (0, len(header) - 1) else cell.rjust(size)
            for k, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join([*lines, "", *table, "", found.reason])


def _number(count: int | None) -> str:
    return "memory not known" if count is None else f"{count:,}"
