r"""Train a transformer on bytes of text, with its sequence sharded over devices from end to end.

It shows:

1. A model is sequence-parallel if its batch is sharded and its attention is distattn's. The model, in
   `byte_model/transformer.py`, is the one that runs on one device. Every array in it, from tokens to
   losses, stays sharded. Only attention moves shards, which is counted in the program.
2. Load balance: tokens, labels and positions are reordered (`distattn.layouts`) so that all devices have
   equal work under a causal mask. This happens once, on the host, and is never undone.
3. Memory of a step on each device, and on one device with dense attention.
4. Checkpoints do not depend on the mesh: half of the steps are saved with orbax, restored on a mesh of
   another shape and trained to the end. The losses are those of the uninterrupted run.
5. A job of several processes that may die: `--save-every` saves every N steps, and on SIGTERM. `--resume`
   continues from the last checkpoint, on any number of processes and devices.
6. Bitwise reproducible training on any mesh: `--reproducible`. `byte_model/reproducible_layers.py` says
   what it needs besides attention. The losses after resuming on another mesh then equal those of the
   uninterrupted run.

    pip install -e '.[train]'
    python examples/08_train.py
    python examples/08_train.py --length 8192  # minutes: one device with dense attention would need 14 GiB
    python examples/08_train.py --length 512 --steps 20 --strategy gather_kv --compare
    python examples/08_train.py --length 2048 --mesh 2x2x2 --strategy auto --resume-mesh 1x4
    python examples/08_train.py --length 2048 --reproducible --resume-mesh 1x1
    distattn launch -n 4 --devices-per-process 2 -- \
        python examples/08_train.py --mesh 2x4 --out runs/job --save-every 2
    distattn launch -n 2 --devices-per-process 2 -- \
        python examples/08_train.py --mesh 1x4 --out runs/job --save-every 2 --resume
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import distattn
from byte_model.checkpoints import disturb, listen, restore, save
from byte_model.options import LAYOUTS, name_of, parse
from byte_model.report import difference, listed, moved, plot, progress, say, show
from byte_model.transformer import Attention, Config, Job, byte_entropy, train_step
from distattn import distributed
from distattn.testing import fake_devices

DEVICE_MIB = 4096  # memory of one device, for comparison
AfterStep = Callable[[list[float], nnx.State], bool]
BOUND = 1e-3  # largest relative difference between losses: rounding, which training amplifies


# ------------------------------------------------------------------------ the mesh


def make_mesh(sizes: tuple[int, ...]) -> Mesh:
    """Make a mesh of axes 'data' and 'sequence', or with three sizes 'data', 'across' and 'within'.

    The axes are Explicit, so the type of each array says how it is sharded, and an operation that needs
    another device's shard of the sequence is an error instead of a silent gather.
    """
    names = ("data", "sequence") if len(sizes) == 2 else ("data", "across", "within")
    devices = jax.devices()[: math.prod(sizes)]
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=devices)


def sequence_axes(mesh: Mesh) -> tuple[str, ...]:
    """Return the axes that shard the sequence: all but the first."""
    return mesh.axis_names[1:]


def one_device(query: jax.Array, key: jax.Array, value: jax.Array, _: jax.Array) -> jax.Array:
    """Attend on one device; `jax.nn` has no positions, so the sequence must be in order."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def many_devices(mesh: Mesh, strategy: str, reproducible: bool = False) -> Attention:
    """Return attention over a sequence that is sharded over the mesh, in the order of `positions`."""
    sharding = NamedSharding(mesh, P("data", sequence_axes(mesh)))

    def attend(*arrays: jax.Array) -> jax.Array:
        query, key, value, positions = arrays
        return distattn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_positions=positions,
            key_positions=positions,
            query_sharding=sharding,
            key_value_sharding=sharding,
            strategy=strategy,
            reproducible=reproducible,
        )

    return attend


# ------------------------------------------------------------------------ the training


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A compiled job on a mesh."""

    job: Job
    order: np.ndarray  # int32[T], the position at each slot
    state_like: nnx.State  # shapes, dtypes and shardings of parameters and optimizer
    batch_sharding: dict
    step: jax.stages.Compiled  # (state, batch) -> (state, loss); takes the memory of the old state

    @classmethod
    def compile(
        cls,
        job: Job,
        mesh: Mesh | None = None,
        layout: str = "contiguous",
        strategy: str = "auto",
        compiler_options: dict | None = None,
    ) -> "Trainer":
        """Compile for the mesh; without a mesh for one device, with dense attention, in order."""
        if mesh is None:
            attend, shards = one_device, 1
            replicated = by_row = by_slot = SingleDeviceSharding(jax.devices()[0])
        else:
            axes = sequence_axes(mesh)
            attend = many_devices(mesh, strategy, job.config.reproducible)
            shards = math.prod(mesh.shape[a] for a in axes)
            specs = P(), P("data", axes), P(axes)
            replicated, by_row, by_slot = (NamedSharding(mesh, spec) for spec in specs)
        batch_sharding = {"tokens": by_row, "labels": by_row, "positions": by_slot}
        rows = (job.batch, job.length)
        shapes = {"tokens": rows, "labels": rows, "positions": rows[1:]}
        batch_like = {
            name: jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding[name])
            for name, shape in shapes.items()
        }
        # Parameters and optimizer state are replicated; XLA sums their gradients over all devices.
        graphdef, state_like = nnx.split(nnx.eval_shape(job.create))
        state_like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state_like
        )
        step = jax.jit(train_step(graphdef, attend), donate_argnums=0, out_shardings=replicated)
        order = LAYOUTS[layout](job.length, shards)
        program = step.lower(state_like, batch_like).compile(compiler_options)
        return cls(job, order, state_like, batch_sharding, program)

    def start(self) -> nnx.State:
        """Create random parameters and a new optimizer state, directly on their devices."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_like)
        return jax.jit(lambda: nnx.state(self.job.create()), out_shardings=shardings)()

    def batch(self, step: int) -> dict[str, jax.Array]:
        """Return the sharded batch of a step, in the order of the slots.

        Each process reads the whole batch and takes the shards of its devices.
        """
        rows = self.job.read(step)
        slots = {name: x[:, self.order] for name, x in rows.items()} | {"positions": self.order}
        return {
            name: jax.make_array_from_callback(x.shape, self.batch_sharding[name], x.__getitem__)
            for name, x in slots.items()
        }

    def train(
        self, state: nnx.State, steps: range, after: AfterStep | None = None
    ) -> tuple[nnx.State, list[float]]:
        """Return the state after the steps, and the loss of each step. `state` is donated.

        `after(losses, state)` is called after each step. If it returns True, training stops.
        """
        losses = []
        for i in steps:
            began = time.perf_counter()
            state, loss = self.step(state, self.batch(i))
            losses.append(float(loss))
            tokens_per_s = self.job.batch * self.job.length / (time.perf_counter() - began)
            progress(i + 1, self.job.steps, losses[-1], tokens_per_s)
            if after is not None and after(losses, state):
                break
        return state, losses

    @property
    def temp_mib(self) -> float:
        """Memory of a step on each device besides its arguments, from the compiler."""
        return self.step.memory_analysis().temp_size_in_bytes / 2**20


# ------------------------------------------------------------------------ a job that may die


def train_on(options: argparse.Namespace, job: Job) -> None:
    """Train from the last checkpoint, if there is one, and save, in all processes of the job."""
    mesh_name, directory = name_of(options.mesh), options.out.resolve() / "checkpoints"
    if math.prod(options.mesh) != len(jax.devices()):
        raise ValueError(
            f"--mesh {mesh_name} has {math.prod(options.mesh)} devices, and there are "
            f"{len(jax.devices())}, in {jax.process_count()} process(es); pass a mesh of all of them"
        )
    trainer = Trainer.compile(job, make_mesh(options.mesh), options.layout, options.strategy)
    report(trainer)
    saved = restore(directory, job, trainer.state_like) if options.resume else None
    before, state = saved or ([], trainer.start())
    verb = f"continuing after step {len(before)} of" if before else "training"
    devices = f"on {mesh_name} devices, processes: {jax.process_count()}"
    say(f"{verb} {job.steps} steps of {job.batch} x {job.length} bytes, {devices}")
    told_to_end = listen()

    def after(losses: list[float], state: nnx.State) -> bool:
        done = len(before) + len(losses)
        last = told_to_end(done)
        if last or done == job.steps or done % (options.save_every or job.steps) == 0:
            save(directory, job, before + losses, state)
        if last:
            say(f"told to end: saved after step {done}")
        disturb(done, options.at, options.signal)
        return last

    _, losses = trainer.train(state, range(len(before), job.steps), after)
    if len(before) + len(losses) < job.steps:
        return
    curves = {
        "saved before": (range(len(before)), before),
        f"on {mesh_name} devices": (range(len(before), job.steps), losses),
    }
    if jax.process_index() == 0:
        plot(options.out / "loss.png", {k: v for k, v in curves.items() if v[1]}, byte_entropy())
    conclude(before + losses, options.out)


# ------------------------------------------------------------------------ the command


def report(many: Trainer, one: Trainer | None = None) -> None:
    """Show the collectives and the memory of a step, and its memory on one device."""
    inside, outside = moved(many.step.as_text())
    show(f"""
Collectives of a step, counted in the program
  attention, layers: {many.job.config.layers}           {listed(inside)}
  outside attention              {listed(outside)}: the gradients, and the loss""")
    assert set(outside) <= {"all-reduce"}
    show(f"Memory of a step, compiled at {many.job.length} bytes")
    if one is not None:
        verdict = "more than" if one.temp_mib > DEVICE_MIB else "within"
        dense = f"{one.temp_mib:.0f} MiB: {verdict} the {DEVICE_MIB} MiB of a device"
        show(f"  one device, dense attention    {dense}")
    show(f"  each device of the mesh        {many.temp_mib:.0f} MiB\n")


def conclude(losses: list[float], out: Path, differences: dict[str, float] | None = None) -> None:
    """Show the first and the last loss, and the differences from the losses of other runs."""
    first, last, bytewise = losses[0], losses[-1], byte_entropy()
    show(f"""
Loss, nats per byte               first {first:.4f}, last {last:.4f}
  byte frequencies alone give    {bytewise:.4f}, which is {"more" if bytewise > last else "less"}""")
    if differences:
        show("Largest relative difference of losses")
    for name, largest in (differences or {}).items():
        show(f"  {name:<30} {largest:.1e}")
        assert largest < BOUND
    assert last < first
    show(f"The curve is in {out / 'loss.png'}")


def train_twice(options: argparse.Namespace, job: Job) -> None:
    """Train, resume from half of the steps on another mesh, and compare."""
    settings = {"layout": options.layout, "strategy": options.strategy}
    first, second = name_of(options.mesh), name_of(options.resume_mesh)
    say(f"compiling for {first}, {second} and one, {options.layout}, strategy={options.strategy!r}")
    many = Trainer.compile(job, make_mesh(options.mesh), **settings)
    other = Trainer.compile(job, make_mesh(options.resume_mesh), **settings)
    one = Trainer.compile(job)
    report(many, one)

    directory, half = options.out.resolve() / "checkpoints", job.steps // 2

    def save_half(losses: list[float], state: nnx.State) -> bool:
        if len(losses) == half:
            save(directory, job, losses, state)
        return False

    say(f"training {job.steps} steps of {job.batch} x {job.length} bytes, saving after step {half}")
    _, losses = many.train(many.start(), range(job.steps), save_half)
    curves = {f"on {first} devices": (range(job.steps), losses)}

    say(f"resuming after step {half} on {second} devices")
    before, state = restore(directory, job, other.state_like)
    assert before == losses[:half]
    _, tail = other.train(state, range(half, job.steps))
    curves[f"resumed on {second} devices"] = (range(half, job.steps), tail)
    differences = {"resumed from uninterrupted": difference(tail, losses[half:])}
    if job.config.reproducible:
        assert tail == losses[half:]

    if options.compare:
        say("training on one device, with jax.nn.dot_product_attention")
        _, expected = one.train(one.start(), range(job.steps))
        curves["on one device"] = (range(job.steps), expected)
        differences["many devices from one"] = difference(losses, expected)

    plot(options.out / "loss.png", curves, byte_entropy())
    conclude(losses, options.out, differences)
    print("It learns, and its losses do not depend on the mesh.")


def main(arguments: list[str] | None = None) -> None:
    """Run one process of a job, or the only one."""
    options = parse(
        arguments
    )  # before other processes start, so that all of them see --out as it was
    distributed.initialize()
    if not jax.distributed.is_initialized():
        resume_mesh = () if options.as_job else options.resume_mesh
        fake_devices(max(math.prod(options.mesh), math.prod(resume_mesh)))
    elif not options.as_job:
        raise ValueError("several processes only train; pass --save-every N and --out DIRECTORY")
    model = {name: getattr(options, name) for name in ("dim", "layers", "remat", "reproducible")}
    config = Config(**model)
    job = Job(config, options.batch, options.length, options.steps, options.lr, options.seed)
    (train_on if options.as_job else train_twice)(options, job)


if __name__ == "__main__":
    main()
