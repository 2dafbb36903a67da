"""Training with the sequence split over a mesh is training on one device, loss for loss."""

import dataclasses
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_examples import printed

from distattn import layouts
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("standard_promotion")
EXAMPLE = "08_train"
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
STRATEGIES = ("reduce_scatter", "gather_kv", "ring", "ulysses", "auto")
LAYOUTS = ("contiguous", "zigzag", "striped")
# A loss is the mean over these, and each is a sum over the keys: as many roundings, at most.
LENGTH, BATCH, STEPS = 256, 2, 4
KEYS = LENGTH * BATCH


@pytest.fixture(scope="module")
def model(example):
    return importlib.import_module("byte_model.transformer")


@pytest.fixture(scope="module")
def job(example):
    config = example.Config(dim=32, layers=1, heads=8, kv_heads=4)
    return example.Job(config, batch=BATCH, length=LENGTH, steps=STEPS)


@pytest.fixture(scope="module")
def trainer(example, job):
    """`trainer(sizes, strategy, layout)`: each program is compiled once, for all layouts."""

    @functools.cache
    def compiled(sizes, strategy):
        return example.Trainer.compile(job, example.make_mesh(sizes), strategy=strategy)

    def get(sizes, strategy, layout="contiguous"):
        made = compiled(sizes, strategy)
        shards = int(np.prod(sizes[1:]))
        return dataclasses.replace(made, order=getattr(layouts, layout)(LENGTH, shards))

    return get


@pytest.fixture(scope="module")
def start():
    """Return the initial state, made once for each mesh and copied, because programs donate it."""
    made = {}

    def get(trainer):
        where = trainer.batch_sharding["tokens"]
        if where not in made:
            made[where] = trainer.start()
        return jax.tree.map(lambda x: x.copy(), made[where])

    return get


@pytest.fixture(scope="module")
def one(example, job):
    """Compile the job on one device, with jax.nn.dot_product_attention and the sequence in order."""
    return example.Trainer.compile(job)


@pytest.fixture(scope="module")
def expected(one, start):
    """Return the losses of `one`."""
    return one.train(start(one), range(STEPS))[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_of_one_device(trainer, start, expected, strategy, layout):
    run = trainer((2, 4), strategy, layout)
    losses = run.train(start(run), range(STEPS))[1]
    assert_close(losses, expected, np.float32, KEYS, what=f"loss {strategy} {layout}")


@pytest.mark.parametrize("strategy", ["ulysses_ring", "ulysses_gather_kv"])
def test_losses_over_two_axes_of_sequence(trainer, start, expected, strategy):
    run = trainer((2, 2, 2), strategy, "zigzag")
    losses = run.train(start(run), range(STEPS))[1]
    assert_close(losses, expected, np.float32, KEYS, what=f"loss {strategy} zigzag")


def test_losses_on_auto_axes(example, job, expected):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    run = example.Trainer.compile(job, mesh, layout="zigzag", strategy="ring")
    losses = run.train(run.start(), range(STEPS))[1]
    assert_close(losses, expected, np.float32, KEYS, what="loss ring zigzag, Auto axes")


def test_gradients_are_those_of_one_device(example, model, trainer, start, one):
    def gradients(run, attend):
        graphdef, like = nnx.split(nnx.eval_shape(lambda: run.job.create()[0]))
        parameters = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(start(run)[0]))

        def loss(parameters, batch):
            return model.mean_loss(nnx.merge(graphdef, parameters), batch, attend)

        return jax.jit(jax.grad(loss))(parameters, run.batch(0))

    run = trainer((2, 4), "gather_kv", "striped")
    mesh = run.batch_sharding["tokens"].mesh
    with jax.numpy_dtype_promotion("strict"):
        many = jax.tree.leaves_with_path(gradients(run, example.many_devices(mesh, "gather_kv")))
    reference = jax.tree.leaves(gradients(one, example.one_device))
    assert len(many) == len(reference) == 3 + 9  # with the norms: none is left out
    for (path, gradient), wanted in zip(many, reference, strict=True):
        what = f"gradient {jax.tree_util.keystr(path)}"
        assert np.abs(wanted).max() > 0
        assert_close(gradient, wanted, np.float32, KEYS, what=what)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_label_is_the_next_byte_of_the_text(model, trainer, layout):
    run = trainer((2, 4), "ring", layout)
    text = model.TEXT.tobytes()
    batch = run.batch(3)
    assert batch["labels"].sharding.spec == PartitionSpec("data", "sequence")
    shards = {x.device: x.data for x in batch["labels"].addressable_shards}
    tokens = {x.device: x.data for x in batch["tokens"].addressable_shards}
    windows = np.asarray(layouts.restore(np.asarray(batch["tokens"]), run.order))
    starts = [text.find(window.astype(np.uint8).tobytes()) for window in windows]
    assert min(starts) >= 0
    for i, positions in enumerate(batch["positions"].addressable_shards):
        # Fake devices are in the order of the mesh: first those of the first row of the batch.
        began, device = starts[i // 4], positions.device
        at = began + np.asarray(positions.data)
        np.testing.assert_array_equal(tokens[device][0], model.TEXT[at])
        np.testing.assert_array_equal(shards[device][0], model.TEXT[at + 1])


def test_resuming_on_another_mesh(example, job, trainer, start, tmp_path):
    run = trainer((2, 4), "gather_kv", "zigzag")
    saved = []

    def save_half(losses, state):
        if len(losses) == 2:
            example.save(tmp_path, job, losses, state)
            saved.extend(np.asarray(x) for x in jax.tree.leaves(state))

    _, losses = run.train(start(run), range(STEPS), save_half)
    other = trainer((1, 8), "gather_kv", "striped")
    before, state = example.restore(tmp_path, job, other.state_like)
    assert before == losses[:2]
    for x, wanted in zip(jax.tree.leaves(state), saved, strict=True):
        assert x.sharding == NamedSharding(example.make_mesh((1, 8)), PartitionSpec())
        np.testing.assert_array_equal(x, wanted)
    _, tail = other.train(state, range(2, STEPS))
    assert_close(tail, losses[2:], np.float32, KEYS, what="loss resumed on 1 x 8")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_moves_outside_attention_but_gradients(example, trainer, strategy):
    inside, elsewhere = example.moved(trainer((2, 4), strategy).step.as_text())
    assert inside.total() > 0
    assert set(elsewhere) == {"all-reduce"}


def test_remat_keeps_what_attention_returns(example, job, trainer, start, expected):
    plain = trainer((2, 4), "ring", "zigzag")
    config = dataclasses.replace(job.config, remat=True)
    run = example.Trainer.compile(
        dataclasses.replace(job, config=config), example.make_mesh((2, 4)), "zigzag", "ring"
    )
    losses = run.train(start(plain), range(STEPS))[1]
    assert_close(losses, expected, np.float32, KEYS, what="loss ring zigzag, remat")
    assert example.moved(run.step.as_text()) == example.moved(plain.step.as_text())


def test_one_device_could_not_hold_it(example):
    job = example.Job(example.Config(layers=1), length=8192)
    dense = example.Trainer.compile(job)
    assert dense.temp_mib > example.DEVICE_MIB
    ours = example.Trainer.compile(job, example.make_mesh((2, 4)), "zigzag", "ring")
    assert ours.temp_mib < dense.temp_mib / 50


def test_as_it_is_run(tmp_path):
    arguments = ("--length", "256", "--layers", "1", "--resume-mesh", "1x4", "--compare", "--remat")
    text = printed("examples/08_train.py", *arguments, "--out", str(tmp_path / "run"))
    for pattern in (
        r"attention, layers: 1 +\d+ collective-permute",
        r"outside attention +\d all-reduce: the gradients, and the loss",
        r"one device, dense attention +\d+ MiB: within the 4096 MiB of a device",
        r"byte frequencies alone give +\d\.\d+, which is more",
        r"resumed from uninterrupted +\d\.\de[-+]\d\d",
        r"many devices from one +\d\.\de[-+]\d\d",
        r"It learns, and its losses do not depend on the mesh\.",
    ):
        assert re.search(f"^ *{pattern}$", text, re.MULTILINE), (pattern, text)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "--steps 3: pass at least 4 steps"),
        (["--dim", "36"], "--dim 36: it must be a multiple of 8"),
        (["--mesh", "8"], "'8' is not a mesh; write data x sequence, as 2x4"),
        (["--mesh", "2x0"], "'2x0' is not a mesh"),
        (["--batch", "3"], "--batch 3 is not divisible by the 2 devices of 'data'"),
        (["--out", str(EXAMPLES)], "is not empty; pass a new directory, or --resume"),
        (["--save-every", "0"], "--save-every 0: pass 1 or more"),
        (["--save-every", "2"], "--save-every and --resume need --out"),
        (["--resume", "--out", "x", "--compare"], "--resume only train; leave out --compare"),
    ],
)
def test_wrong_arguments(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_window_longer_than_the_text(example):
    with pytest.raises(ValueError, match="length is 2000000; the text has .* ask for fewer"):
        example.Job(length=2_000_000).read(0)


def test_the_bar_is_full_in_the_end(example, capsys):
    example.progress(1, 2, 3.0, 1234.0)
    example.progress(2, 2, 2.5, 1234.0)
    first, last = capsys.readouterr().err.strip("\n").split("\r")[1:]
    assert first == f"[{'=' * 12}{' ' * 12}] step 1/2  loss 3.0000  1,234 tokens/s "
    assert last == f"[{'=' * 24}] step 2/2  loss 2.5000  1,234 tokens/s "


# ------------------------------------------------------------------------ a job that may die

SMALL = ("--length", "64", "--dim", "32", "--layers", "1", "--strategy", "gather_kv")
SMALL_JOB = (*SMALL, "--steps", "12", "--save-every", "2")


def recorded(out):
    """Return the losses of all steps up to the latest checkpoint."""
    names = (path.name for path in (out / "checkpoints").iterdir())
    latest = max(int(name) for name in names if name.isdecimal())
    record = json.loads((out / "checkpoints" / str(latest) / "record" / "metadata").read_text())
    assert len(record["losses"]) == latest
    return record["losses"]


@pytest.fixture(scope="module")
def train(example):
    """`train(out, *arguments)`: the small job in this process on its 8 devices, compiled once."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.Trainer, "compile", functools.cache(example.Trainer.compile))

        def run(out, *arguments):
            options = example.parse([*SMALL_JOB, "--out", str(out), *arguments])
            job = example.Job(
                example.Config(dim=options.dim, layers=options.layers),
                length=options.length,
                steps=options.steps,
                lr=options.lr,
            )
            example.train_on(options, job)

        yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    """Return the directory of an undisturbed job; --resume without a checkpoint starts it."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(out, "--resume")
    return out


def test_the_latest_checkpoints_are_kept_and_a_finished_job_is_finished(train, undisturbed, capsys):
    kept = {path.name for path in (undisturbed / "checkpoints").iterdir()}
    assert kept == {"8", "10", "12"}
    train(undisturbed, "--resume")
    text = capsys.readouterr().out
    assert (
        "continuing after step 12 of 12 steps of 2 x 64 bytes, on 2 x 4 devices, processes: 1"
        in text
    )
    assert "The curve is in" in text


def test_sigterm_saves_and_the_rest_is_the_same_to_the_bit(train, undisturbed, tmp_path, capsys):
    train(tmp_path / "run", "--at", "5", "--signal", "SIGTERM")  # noticed behind the next step
    text = capsys.readouterr().out
    saved = recorded(tmp_path / "run")
    assert 5 < len(saved) < 12
    assert f"told to end: saved after step {len(saved)}" in text
    assert not (tmp_path / "run" / "loss.png").exists()
    train(tmp_path / "run", "--resume")
    assert f"continuing after step {len(saved)} of 12 steps" in capsys.readouterr().out
    assert recorded(tmp_path / "run") == recorded(undisturbed)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--lr", "0.5"],
            "is of another run: lr was 0.01 and is 0.5; pass the same settings, or a new",
        ),
        (["--mesh", "1x4"], "--mesh 1 x 4 has 4 devices, and there are 8, in 1 process.*; pass a"),
    ],
)
def test_wrong_resumption(train, undisturbed, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(undisturbed, "--resume", *arguments)


def test_several_processes_need_to_be_told_where_to_save(example, monkeypatch):
    monkeypatch.setattr(example.distributed, "initialize", lambda: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="several processes only train; pass --save-every N and"):
        example.main([])


def launched(processes, *arguments):
    """Run the small job in processes of two devices; return its exit code and output."""
    launch = ("-m", "distattn", "launch", "-n", str(processes), "--devices-per-process", "2")
    program = (sys.executable, "-W", "error", str(EXAMPLES / "08_train.py"), *SMALL_JOB, *arguments)
    done = subprocess.run(
        [sys.executable, *launch, "--timeout", "120", "--", *program],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    return done.returncode, done.stdout


def test_killed_and_preempted_it_goes_on_on_fewer_processes(example, undisturbed, tmp_path):
    out = tmp_path / "run"
    code, text = launched(4, "--out", str(out), "--mesh", "2x4", "--at", "5")
    assert code == 128 + signal.SIGKILL, text
    assert "distattn launch: rank 2 was killed by SIGKILL" in text
    assert text.count("training 12 steps") == text.count("step 5/12") == 1  # one of four says it
    before_kill = recorded(out)
    assert len(before_kill) == 4

    preempted = ("--resume", "--at", "5", "--signal", "SIGTERM")
    code, text = launched(2, "--out", str(out), "--mesh", "1x4", *preempted)
    assert code == 0, text
    assert (
        "continuing after step 4 of 12 steps of 2 x 64 bytes, on 1 x 4 devices, processes: 2"
        in text
    )
    before_end = recorded(out)
    assert f"told to end: saved after step {len(before_end)}" in text
    assert before_end[:4] == before_kill

    text = printed(
        "examples/08_train.py", *SMALL_JOB, "--out", str(out), "--mesh", "1x2", "--resume"
    )
    assert f"continuing after step {len(before_end)} of 12 steps" in text
    losses = recorded(out)
    assert losses[: len(before_end)] == before_end
    assert len(losses) == 12
    assert example.difference(losses, recorded(undisturbed)) < example.BOUND
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
