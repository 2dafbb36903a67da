"""The command line of a training run (example 08)."""

import argparse
import math
import time
from pathlib import Path

from byte_model.reproducible_layers import BLOCK
from byte_model.transformer import Config, Job
from distattn import layouts

LAYOUTS = {name: getattr(layouts, name) for name in ("contiguous", "zigzag", "striped")}


def mesh_sizes(text: str) -> tuple[int, ...]:
    """Parse a mesh such as 2x4 or 2x2x2."""
    sizes = text.split("x")
    if len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a mesh; write data x sequence, as 2x4, or 2x2x2 for two axes of sequence"
        )
    return tuple(int(size) for size in sizes)


def name_of(mesh: tuple[int, ...]) -> str:
    """Return a mesh as text, as 2 x 4."""
    return " x ".join(map(str, mesh))


def check_blocks(parser: argparse.ArgumentParser, options: argparse.Namespace, shards: int) -> None:
    """Exit with a usage error unless the layout keeps whole blocks of bytes together on any mesh."""
    chunks = {"contiguous": shards, "zigzag": 2 * shards}.get(options.layout)
    if chunks is None:
        parser.error(
            f"--layout {options.layout} leaves no {BLOCK} bytes together, as --reproducible needs; "
            "pass --layout zigzag or contiguous"
        )
    if options.length % (chunks * BLOCK):
        parser.error(
            f"--length {options.length} is not {chunks} chunks of whole blocks of {BLOCK} bytes, as "
            f"--reproducible needs in {options.layout} over {shards} devices; pass a multiple of "
            f"{chunks * BLOCK}"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level transformer whose sequence is sharded over fake devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=Job.steps, help="steps of training, 4 or more")
    add("--length", type=int, default=Job.length, help="bytes in a window")
    add("--batch", type=int, default=Job.batch, help="windows in a step")
    add("--mesh", type=mesh_sizes, default="2x4", help="devices: data x sequence")
    add("--resume-mesh", type=mesh_sizes, default="1x8", help="devices that repeat the second half")
    add("--strategy", default="ring", help="strategy of distattn")
    add("--layout", choices=LAYOUTS, default="zigzag", help="order of the positions")
    add(
        "--dim", type=int, default=Config.dim, help="width of the model: 4 heads, 2 key/value heads"
    )
    add("--layers", type=int, default=Config.layers, help="blocks of the model")
    add(
        "--reproducible",
        action="store_true",
        help=f"bitwise equal on any mesh whose devices have whole blocks of {BLOCK} bytes",
    )
    add("--remat", action="store_true", help="compute activations again in the backward pass")
    add("--lr", type=float, default=Job.lr, help="the highest learning rate")
    add("--seed", type=int, default=Job.seed, help="seed of weights and batches")
    add("--compare", action="store_true", help="train on one device too, with dense attention")
    add("--out", type=Path, help="new directory for checkpoint and curve (default: runs/DATE)")
    add("--save-every", type=int, metavar="N", help="only train, and save every N steps to --out")
    add("--resume", action="store_true", help="only train, from the last checkpoint in --out")
    add("--at", type=int, help=argparse.SUPPRESS)
    add("--signal", default="SIGKILL", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error(f"--steps {options.steps}: pass at least 4 steps")
    if options.save_every is not None and options.save_every < 1:
        parser.error(f"--save-every {options.save_every}: pass 1 or more")
    options.as_job = options.resume or options.save_every is not None
    if options.as_job and options.out is None:
        parser.error("--save-every and --resume need --out, the directory of the run")
    if options.as_job and options.compare:
        parser.error("--save-every and --resume only train; leave out --compare")
    if options.dim % 8:
        parser.error(f"--dim {options.dim}: it must be a multiple of 8, for 4 heads of pairs")
    for sizes in (options.mesh, options.resume_mesh):
        if options.batch % sizes[0]:
            parser.error(
                f"--batch {options.batch} is not divisible by the {sizes[0]} devices of 'data'; "
                "pass a multiple, or a mesh with fewer of them"
            )
        if options.reproducible:
            check_blocks(parser, options, math.prod(sizes[1:]))
    if options.out is None:
        options.out = Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if not options.resume and options.out.exists() and any(options.out.iterdir()):
        parser.error(
            f"--out {options.out} is not empty; pass a new directory, or --resume to continue it"
        )
    return options
