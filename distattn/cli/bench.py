"""`distattn bench`: what is timed on the user's own devices."""

import argparse
import contextlib
from collections.abc import Generator
from pathlib import Path

import jax
import jax.numpy as jnp

from distattn._compat import interpreted
from distattn.cli.arguments import CommandError, Subparsers, at_least, refuse, some_of
from distattn.cli.tuning import Workload, tune
from distattn.local.kernels.tuned import VARIABLE, Measured, read, write

KINDS = ("decode", "prefill", "gradient")


def add(subparsers: Subparsers) -> None:
    """The command and its arguments."""
    parser = subparsers.add_parser(
        "bench",
        help="times the kernels of this machine's accelerator",
        description="What is timed on your own devices.",
    )
    what = parser.add_subparsers(title="what", required=True, metavar="WHAT")
    _add_kernels(what)


def _add_kernels(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "kernels",
        help="block sizes of the attention kernels",
        description="Times the attention kernels of one device with every block size that it has room for, "
        "interleaved, and prints the medians, the fastest first. With --tune the fastest go into a file, "
        f"which the library reads where the environment variable {VARIABLE} names it: in every process of "
        "a job.",
    )
    whole, argument = at_least(1), parser.add_argument
    argument(
        "--tune",
        metavar="FILE",
        help="write the fastest sizes there, as JSON; what it holds of other calls and chips stays",
    )
    argument(
        "--kinds",
        type=some_of(KINDS),
        default=KINDS,
        help=f"some of {','.join(KINDS)} (default: all)",
    )
    argument("--widths", type=_widths, default=(128,), metavar="H,...", help="default 128")
    argument(
        "--dtypes",
        type=_dtypes,
        default=(jnp.dtype(jnp.bfloat16),),
        metavar="NAME,...",
        help="of keys and values, as bfloat16,int8 (default bfloat16)",
    )
    argument("--batch", type=whole, default=4, metavar="B", help="of decode; else 1 (default 4)")
    argument("--heads", type=whole, default=32, metavar="N", help="of the query (default 32)")
    argument("--kv-heads", type=whole, default=8, metavar="K", help="default 8")
    argument(
        "--context", type=whole, default=32768, metavar="S", help="keys of decode (default 32768)"
    )
    argument(
        "--tokens",
        type=whole,
        default=4096,
        metavar="T",
        help="of prefill, gradient (default 4096)",
    )
    argument(
        "--repeats", type=whole, default=9, metavar="N", help="how often each is timed (default 9)"
    )
    argument(
        "--interpret",
        action="store_true",
        help="try the command on a CPU, by Pallas' interpreter: its times say nothing",
    )
    parser.set_defaults(run=_run)


def _widths(value: str) -> tuple[int, ...]:
    parts = value.split(",")
    if not all(x.isdecimal() and int(x) > 0 for x in parts):
        refuse(value, "head dimensions, as 64,128")
    return tuple(map(int, parts))


def _dtypes(value: str) -> tuple[jnp.dtype, ...]:
    try:
        return tuple(jnp.dtype(name) for name in value.split(","))
    except TypeError:
        refuse(value, "names of dtypes, as bfloat16,int8")


def _run(options: argparse.Namespace) -> None:
    if options.heads % options.kv_heads:
        raise CommandError(
            f"--heads {options.heads} is no multiple of --kv-heads {options.kv_heads}; pass one that is"
        )
    if jax.default_backend() == "cpu" and not options.interpret:
        raise CommandError(
            "bench kernels: there is nothing to time, JAX sees no accelerator here, only a CPU; run it on "
            "a machine with a TPU or GPU (pip install 'jax[tpu]', 'jax[cuda12]'), or try it by --interpret"
        )
    workloads = _workloads(options)
    if not workloads:
        raise CommandError(
            "bench kernels: keys of 8 bits have no gradient; pass --kinds decode,prefill, or other --dtypes"
        )
    with _mended():
        if options.tune and Path(options.tune).exists():
            read(options.tune)  # before minutes have gone into it
        with interpreted() if options.interpret else contextlib.nullcontext():
            rows = [_timed(workload, options.repeats) for workload in workloads]
        if options.tune:
            write(options.tune, rows)
            print(f"wrote {options.tune}, which the library reads where {VARIABLE} names it")


@contextlib.contextmanager
def _mended() -> Generator[None, None, None]:
    """What the user can mend, as what the command says."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as error:
        raise CommandError(f"bench kernels: {error}") from error


def _workloads(options: argparse.Namespace) -> list[Workload]:
    return [
        Workload(
            kind,
            options.batch if kind == "decode" else 1,
            1 if kind == "decode" else options.tokens,
            options.context if kind == "decode" else options.tokens,
            options.heads,
            options.kv_heads,
            width,
            dtype,
        )
        for kind in options.kinds
        for width in options.widths
        for dtype in options.dtypes
        if kind != "gradient" or dtype.itemsize > 1  # keys of 8 bits have none
    ]


def _timed(workload: Workload, repeats: int) -> Measured:
    """Times a workload and prints what came of it."""
    finding = tune(workload, repeats)
    row = finding.measured()
    print(
        f"{row.chip}: {row.kind}, B={workload.batch} T={workload.queries} S={workload.keys} "
        f"N={workload.heads} K={workload.kv_heads} H={row.width} {row.dtype}, median of {repeats}"
    )
    for x in finding.candidates:
        own = "  (the library's own choice)" if x == finding.own else ""
        print(f"  {x.rows:6} rows x {x.keys:5} keys {1e3 * x.seconds:12.4f} ms{own}")
    for failure in finding.left_out:
        print(f"  left out: {failure}")
    return row
