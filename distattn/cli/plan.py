"""`distattn plan`: does it fit on a pod, what will it cost, which strategy; without any device."""

import argparse
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from distattn.cli.arguments import (
    CommandError,
    Subparsers,
    amount_at_least,
    at_least,
    axis_names,
    mesh_axes,
)
from distattn.cli.compiled import compiled_layer
from distattn.cli.picture import draw
from distattn.cli.plan_text import plan_text
from distattn.planning.chips import CHIPS
from distattn.planning.cost import FORMULAS, Link, links_from
from distattn.planning.plan import Workload, plan
from distattn.planning.pods import FORM, Pod, pod

SUFFIXES = (".svg", ".png", ".pdf")
DTYPES = {
    "f8": jnp.dtype(jnp.float8_e4m3fn),
    "bf16": jnp.dtype(jnp.bfloat16),
    "f16": jnp.dtype(jnp.float16),
    "f32": jnp.dtype(jnp.float32),
    "f64": jnp.dtype(jnp.float64),
}
# Of what may be left out; an argument of None is one that was.
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
    """The command and its arguments."""
    parser = subparsers.add_parser(
        "plan",
        help="predicts memory, traffic and time of attention on a pod of any size, without one",
        description="By formula, from data sheets: which strategy to take on a pod for one step over all "
        "layers, what each device holds and sends, how long it takes, the largest context that fits, and "
        "why the other strategies lose. It starts no device. Lengths may be written as 128k (131072) or 1M "
        "(1048576).",
        epilog="exit code: 0, it fits; 1, it does not; 2, an argument is wrong",
    )
    whole, length, argument = at_least(1), amount_at_least(1), parser.add_argument
    argument(
        "--topology",
        required=True,
        metavar="NAME",
        help=f"{FORM}; chips: {', '.join(CHIPS)}",
    )
    argument("--context", type=length, required=True, metavar="S", help="keys of a sequence")
    argument(
        "--queries",
        type=length,
        metavar="T",
        help="of a sequence: 1 for decoding, as keys for a prompt (default 1; in training, as keys)",
    )
    argument("--batch", type=whole, metavar="B", help="sequences (default 1)")
    argument("--heads", type=whole, required=True, metavar="N", help="of the query")
    argument("--kv-heads", type=whole, metavar="K", help="of key and value (default: --heads)")
    argument("--head-dim", type=whole, metavar="H", help="(default 128)")
    argument("--value-dim", type=whole, metavar="V", help="of value (default: --head-dim)")
    argument("--layers", type=whole, metavar="N", help="(default 1)")
    argument("--dtype", choices=DTYPES, help="of query, key and value (default bf16)")
    argument("--training", action="store_true", default=None, help="the backward pass too")
    argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        help="each query attends to its own key and those before it, which of a prompt is half of all "
        "pairs, shared equally (a layout such as zigzag); default yes. It changes nothing for one query",
    )
    argument(
        "--strategy",
        choices=FORMULAS,
        metavar="NAME",
        help=f"not the best, but one of {', '.join(FORMULAS)}",
    )
    argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXIS=N,...",
        help="axes of the mesh, slow axis first (default: one for each dimension of the network); keys are "
        "sharded over those that shard nothing else",
    )
    argument(
        "--batch-axis", type=axis_names, metavar="AXIS,...", help="axes of the mesh that shard B"
    )
    argument("--heads-axis", type=axis_names, metavar="AXIS,...", help="those that shard N and K")
    argument(
        "--check",
        metavar="FILE",
        help="take the links that distattn check --json FILE has measured along the same axes",
    )
    argument(
        "--reserved-bytes",
        type=amount_at_least(0),
        metavar="N",
        help="of a device's memory, for weights and all else, as 4G (default 0)",
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


def _run(options: argparse.Namespace) -> int:
    given = {name for name, value in vars(options).items() if value is not None}
    for name, value in DEFAULTS.items():
        if name not in given:
            setattr(options, name, value)
    dtype = DTYPES[options.dtype]
    queries = options.queries or (options.context if options.training else 1)
    try:
        where = pod(options.topology)
        found = plan(
            Workload(
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
                causal=options.causal,
            ),
            where,
            sharding=options.mesh,
            batch_axis_name=options.batch_axis,
            heads_axis_name=options.heads_axis,
            strategy=options.strategy,
            links=_measured(options.check, where),
            reserved_bytes=options.reserved_bytes,
        )
        report = compiled_layer(found, dtype) if options.compile else None
        if options.plot:
            draw(found, where, options.plot)
    except (ValueError, NotImplementedError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"--plot {options.plot}: {error.strerror}") from None
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
