"""Train a transformer on bytes of text, with its sequence split over devices from end to end.

What one learns:

1. What makes a model sequence-parallel: the batch lies on the mesh, and attention is distattn's. The
   model, in `byte_transformer.py`, is the one that runs on one device, and every array in it, from
   tokens to losses, keeps its part of the sequence. Only attention moves some, counted in the program.
2. Load balance: tokens, labels and positions are put in an order (`distattn.layouts`) in which all
   devices have the same work under a causal mask. Once, on the host; nothing is ever put back.
3. Memory: what a step takes on each device, and what it would take on one with dense attention.
4. Checkpoints do not depend on the mesh: half of the steps is saved with orbax, restored on a mesh of
   another shape and trained to the end. The losses are those of the run that was not interrupted.

    python examples/08_train.py
    python examples/08_train.py --length 512 --steps 20 --combine gather_kv --compare
    python examples/08_train.py --length 2048 --mesh 2x2x2 --combine auto --resume-mesh 1x4
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import distattn
from byte_transformer import Attention, Config, Job, byte_entropy, train_step
from distattn import layouts
from distattn.testing import fake_devices
from training_report import difference, listed, moved, plot, progress, say

LAYOUTS = {name: getattr(layouts, name) for name in ("contiguous", "zigzag", "striped")}
DEVICE_MIB = 4096  # the memory of the one device, to compare with
BOUND = 1e-3  # of differences between losses, relative: rounding, which training amplifies


# ------------------------------------------------------------------------ the mesh


def make_mesh(sizes: tuple[int, ...]) -> Mesh:
    """Axes 'data' and 'sequence', or with three sizes 'data', 'across' and 'within'.

    The axes are Explicit: the type of each array then says how it is sharded, and an operation that
    would need another device's part of the sequence is an error instead of a silent gather.
    """
    names = ("data", "sequence") if len(sizes) == 2 else ("data", "across", "within")
    devices = jax.devices()[: math.prod(sizes)]
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=devices)


def sequence_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that split the sequence: all but the first."""
    return mesh.axis_names[1:]


def one_device(query: jax.Array, key: jax.Array, value: jax.Array, _: jax.Array) -> jax.Array:
    """What everybody uses; it knows no positions, so the sequence must be in order."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def many_devices(mesh: Mesh, combine: str) -> Attention:
    """Attention over a sequence that is split over the mesh, in the order that positions tell."""

    def attend(*arrays: jax.Array) -> jax.Array:
        query, key, value, positions = arrays
        return distattn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_positions=positions,
            key_positions=positions,
            mesh=mesh,
            axis_name=sequence_axes(mesh),
            query_axis_name=sequence_axes(mesh),
            combine=combine,
        )

    return attend


# ------------------------------------------------------------------------ the training


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A job on a mesh, compiled."""

    job: Job
    order: np.ndarray  # int32[T], the position at each slot
    state_like: nnx.State  # shapes, dtypes and shardings of parameters and optimizer
    batch_sharding: dict
    step: jax.stages.Compiled  # (state, batch) -> (state, loss); takes the memory of the old state

    @classmethod
    def compile(
        cls, job: Job, mesh: Mesh | None = None, layout: str = "contiguous", combine: str = "auto"
    ) -> "Trainer":
        """Compiles for the mesh; without one for one device, with dense attention, in order."""
        if mesh is None:
            attend, shards = one_device, 1
            whole = split = by_slot = SingleDeviceSharding(jax.devices()[0])
        else:
            axes = sequence_axes(mesh)
            attend, shards = many_devices(mesh, combine), math.prod(mesh.shape[a] for a in axes)
            specs = (PartitionSpec(), PartitionSpec("data", axes), PartitionSpec(axes))
            whole, split, by_slot = (NamedSharding(mesh, spec) for spec in specs)
        batch_sharding = {"tokens": split, "labels": split, "positions": by_slot}
        rows = (job.batch, job.length)
        shapes = {"tokens": rows, "labels": rows, "positions": rows[1:]}
        batch_like = {
            name: jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding[name])
            for name, shape in shapes.items()
        }
        # Parameters and optimizer lie whole on every device; XLA sums their gradients over all.
        graphdef, state_like = nnx.split(nnx.eval_shape(job.create))
        state_like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state_like
        )
        step = jax.jit(train_step(graphdef, attend), donate_argnums=0, out_shardings=whole)
        order = LAYOUTS[layout](job.length, shards)
        program = step.lower(state_like, batch_like).compile()
        return cls(job, order, state_like, batch_sharding, program)

    def start(self) -> nnx.State:
        """Random parameters, made where they will lie, and an optimizer that has seen nothing."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_like)
        return jax.jit(lambda: nnx.state(self.job.create()), out_shardings=shardings)()

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of a step in the order of the slots, each device's part on that device."""
        rows = self.job.read(step)
        slots = {name: x[:, self.order] for name, x in rows.items()} | {"positions": self.order}
        return jax.device_put(slots, self.batch_sharding)

    def train(
        self, state: nnx.State, steps: range, after: Callable[[int, nnx.State], None] | None = None
    ) -> tuple[nnx.State, list[float]]:
        """The state behind the steps, and the loss of each. `state` itself is used up.

        `after(number of steps done, state)` is called behind each step.
        """
        losses = []
        for i in steps:
            began = time.perf_counter()
            state, loss = self.step(state, self.batch(i))
            losses.append(float(loss))
            tokens_per_s = self.job.batch * self.job.length / (time.perf_counter() - began)
            progress(i + 1, self.job.steps, losses[-1], tokens_per_s)
            if after is not None:
                after(i + 1, state)
        return state, losses

    @property
    def temp_mib(self) -> float:
        """What a step takes on each device besides its arguments, says the compiler."""
        return self.step.memory_analysis().temp_size_in_bytes / 2**20


def save(directory: Path, step: int, state: nnx.State) -> None:
    """Writes a checkpoint, and waits for it: the next step takes the memory of the state."""
    with ocp.CheckpointManager(directory) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()


def restore(directory: Path, state_like: nnx.State) -> tuple[int, nnx.State]:
    """The latest checkpoint: its number of steps, and the state, laid out as `state_like` says."""
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        return step, manager.restore(step, args=ocp.args.StandardRestore(state_like))


# ------------------------------------------------------------------------ the command


def mesh_sizes(text: str) -> tuple[int, ...]:
    """2x4 or 2x2x2 as numbers."""
    sizes = text.split("x")
    if len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a mesh; write data x sequence, as 2x4, or 2x2x2 for two axes of sequence"
        )
    return tuple(int(size) for size in sizes)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level transformer whose sequence is split over fake devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=Job.steps, help="of training, 4 or more")
    add("--length", type=int, default=Job.length, help="bytes in a window")
    add("--batch", type=int, default=Job.batch, help="windows in a step")
    add("--mesh", type=mesh_sizes, default="2x4", help="devices: data x sequence")
    add("--resume-mesh", type=mesh_sizes, default="1x8", help="where the second half is repeated")
    add("--combine", default="ring", help="how the devices exchange, as in distattn")
    add("--layout", choices=LAYOUTS, default="zigzag", help="which position lies where")
    add(
        "--dim", type=int, default=Config.dim, help="width of the model: 4 heads, 2 key/value heads"
    )
    add("--layers", type=int, default=Config.layers, help="blocks of the model")
    add("--remat", action="store_true", help="compute activations again in the backward pass")
    add("--lr", type=float, default=Job.lr, help="the highest learning rate")
    add("--seed", type=int, default=Job.seed, help="of weights and batches")
    add("--compare", action="store_true", help="train on one device too, with dense attention")
    add("--out", type=Path, help="for checkpoint and curve, a new directory (default: runs/DATE)")
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error(f"--steps {options.steps}: a run is at least 4 steps")
    if options.dim % 8:
        parser.error(f"--dim {options.dim}: it must be a multiple of 8, for 4 heads of pairs")
    for sizes in (options.mesh, options.resume_mesh):
        if options.batch % sizes[0]:
            parser.error(
                f"--batch {options.batch} does not split over the {sizes[0]} devices of 'data'; "
                "pass a multiple, or a mesh with fewer of them"
            )
    if options.out is None:
        options.out = Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty; pass a new directory")
    return options


def report(many: Trainer, one: Trainer) -> None:
    """What moves in a step, and what it takes."""
    inside, elsewhere = moved(many.step.as_text())
    print(f"""
Collectives of a step, counted in the program
  attention, layers: {many.job.config.layers}           {listed(inside)}
  all the rest                   {listed(elsewhere)}: the gradients, and the loss""")
    assert set(elsewhere) <= {"all-reduce"}
    verdict = "more than" if one.temp_mib > DEVICE_MIB else "within"
    print(f"""Memory of a step, compiled at {many.job.length} bytes
  one device, dense attention    {one.temp_mib:.0f} MiB: {verdict} the {DEVICE_MIB} MiB of our device
  here, on each                  {many.temp_mib:.0f} MiB
""")


def main(arguments: list[str] | None = None) -> None:
    """Trains, resumes on another mesh, and compares."""
    options = parse(arguments)
    fake_devices(max(math.prod(options.mesh), math.prod(options.resume_mesh)))
    config = Config(dim=options.dim, layers=options.layers, remat=options.remat)
    job = Job(config, options.batch, options.length, options.steps, options.lr, options.seed)
    how = {"layout": options.layout, "combine": options.combine}
    here, there = (" x ".join(map(str, mesh)) for mesh in (options.mesh, options.resume_mesh))
    say(f"compiling for {here}, {there} and one, {options.layout}, combine={options.combine!r}")
    many = Trainer.compile(job, make_mesh(options.mesh), **how)
    other = Trainer.compile(job, make_mesh(options.resume_mesh), **how)
    one = Trainer.compile(job)
    report(many, one)

    directory, half = options.out.resolve() / "checkpoints", job.steps // 2

    def save_half(done: int, state: nnx.State) -> None:
        if done == half:
            save(directory, done, state)

    say(f"training {job.steps} steps of {job.batch} x {job.length} bytes, saving after step {half}")
    _, losses = many.train(many.start(), range(job.steps), save_half)
    curves = {f"on {here} devices": (range(job.steps), losses)}

    say(f"resuming behind step {half} on {there} devices")
    done, state = restore(directory, other.state_like)
    assert done == half
    _, tail = other.train(state, range(done, job.steps))
    curves[f"resumed on {there} devices"] = (range(done, job.steps), tail)
    apart = {"resumed from uninterrupted": difference(tail, losses[done:])}

    if options.compare:
        say("the same on one device, with jax.nn.dot_product_attention")
        _, expected = one.train(one.start(), range(job.steps))
        curves["on one device"] = (range(job.steps), expected)
        apart["many devices from one"] = difference(losses, expected)

    plot(options.out / "loss.png", curves, byte_entropy())
    first, last, bytewise = losses[0], losses[-1], byte_entropy()
    print(f"""
Loss, nats a byte                {first:.4f} at first, {last:.4f} in the end
  byte frequencies alone give    {bytewise:.4f}, which is {"more" if bytewise > last else "less"}
Largest relative difference of losses""")
    for name, apart_by in apart.items():
        print(f"  {name:<30} {apart_by:.1e}")
        assert apart_by < BOUND
    assert last < first
    print(f"The curve is in {options.out / 'loss.png'}")
    print("It learns, and where it does so cannot be told from the losses.")


if __name__ == "__main__":
    main()
