"""With `reproducible=True` a training run has the same bits on every number of devices."""

import dataclasses
import functools
import importlib
import re

import jax
import numpy as np
import pytest

from distattn import layouts
from tests.cases import FULLY_OPTIMIZED
from tests.examples.test_examples import printed

pytestmark = pytest.mark.usefixtures("standard_promotion")
EXAMPLE = "08_train"
LENGTH, STEPS = 1536, 30  # 24 blocks of 64: as many for each of 1, 2, 3 and 8 devices


@pytest.fixture(scope="module")
def job(example):
    config = example.Config(dim=32, layers=1, heads=2, kv_heads=1, reproducible=True)
    return example.Job(config, batch=1, length=LENGTH, steps=STEPS)


@pytest.fixture(scope="module")
def run(example, job):
    """`run(sizes, strategy, layout, ...)`: the losses, and in the end parameters and optimizer, by name."""

    @functools.cache
    def compiled(sizes, strategy, reproducible):
        config = dataclasses.replace(job.config, reproducible=reproducible)
        return example.Trainer.compile(
            dataclasses.replace(job, config=config),
            example.make_mesh(sizes),
            strategy=strategy,
            compiler_options=FULLY_OPTIMIZED if reproducible else None,
        )

    begin = [
        np.asarray(x)
        for x in jax.tree.leaves(example.Trainer.start(compiled((1, 1), "ring", True)))
    ]

    def train(sizes, strategy, layout="contiguous", *, reproducible=True, steps=STEPS):
        trainer = compiled(sizes, strategy, reproducible)
        trainer = dataclasses.replace(trainer, order=getattr(layouts, layout)(LENGTH, sizes[1]))
        like, structure = jax.tree.flatten(trainer.state_like)
        state = [jax.device_put(x, y.sharding) for x, y in zip(begin, like, strict=True)]
        state, losses = trainer.train(jax.tree.unflatten(structure, state), range(steps))
        named = {
            jax.tree_util.keystr(path): np.asarray(x)
            for path, x in jax.tree.leaves_with_path(state)
        }
        return {"losses": np.array(losses)} | named

    return train


@pytest.fixture(scope="module")
def expected(run):
    """On one device."""
    return run((1, 1), "ring")


def differing(got, expected):
    """The names of what is not equal bit for bit."""
    assert got.keys() == expected.keys()
    return [name for name, x in got.items() if x.tobytes() != expected[name].tobytes()]


@pytest.mark.parametrize(
    ("sizes", "strategy", "layout"),
    [
        ((1, 2), "gather_kv", "zigzag"),
        ((1, 8), "ring", "contiguous"),
    ],
)
def test_thirty_steps_are_equal_bit_for_bit(run, expected, sizes, strategy, layout):
    assert len(expected) == 1 + 3 * 12 + 3  # losses, 12 parameters with two moments, and counters
    assert not differing(run(sizes, strategy, layout), expected)
    assert expected["losses"][-1] < 0.7 * expected["losses"][0]  # and it has learned


def test_parts_do_not_depend_on_the_rows(example):
    """At sizes at which the compiler takes other loops for all rows than for those of one device."""
    layers = importlib.import_module("byte_model.reproducible_layers")
    rows, width = 2048, 256
    random = np.random.default_rng(0)
    x, d = random.normal(size=(2, 2, rows, width)).astype(np.float32)
    kernel = random.normal(size=(width, width)).astype(np.float32)
    labels = np.eye(width, dtype=np.float32)[random.integers(0, width, (2, rows))]
    parts = {
        "normed": lambda x, _: layers.normed(x, 1e-6),
        "silu": lambda x, _: layers.silu(x) * x,
        "rotate_pair": lambda x, y: layers.rotate_pair(x, y, jax.numpy.cos(y), jax.numpy.sin(y))[0],
        "linear": lambda x, _: layers.linear(x, kernel),
        "cross_entropy": layers.cross_entropy,
    }
    for name, part in parts.items():

        @functools.partial(jax.jit, compiler_options=FULLY_OPTIMIZED)
        def both(x, y, d, part=part):
            out, pull = jax.vjp(lambda x: part(x, y), x)
            return out, pull(d[..., 0] if out.ndim == 2 else d)[0]

        other = labels if name == "cross_entropy" else d
        whole = both(x, other, d)
        for size in (64, 192, 256, 1024):
            at = [slice(i, i + size) for i in range(0, rows - size + 1, size)]
            cut = [both(x[:, i], other[:, i], d[:, i]) for i in at]
            for got, wanted in zip(jax.tree.map(lambda *x: np.hstack(x), *cut), whole, strict=True):
                np.testing.assert_array_equal(got, wanted[:, : got.shape[1]], f"{name} {size}")


def test_an_ordinary_run_is_not(run):
    one, many = (run((1, n), "ring", reproducible=False, steps=1) for n in (1, 2))
    assert len(differing(many, one)) > 12


def test_as_it_is_run(tmp_path):
    sizes = ("--length", "256", "--dim", "32", "--layers", "1", "--mesh", "1x2")
    arguments = (*sizes, "--strategy", "gather_kv", "--resume-mesh", "1x1", "--reproducible")
    text = printed("examples/08_train.py", *arguments, "--out", str(tmp_path / "run"))
    assert re.search(r"^ *resumed from uninterrupted +0\.0e\+00$", text, re.MULTILINE), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--layout", "striped"],
            "--layout striped leaves no 64 bytes together, as --reproducible needs; pass --layout zigzag",
        ),
        (
            ["--length", "1536"],
            "--length 1536 is not 16 chunks of whole blocks of 64 bytes, as --reproducible needs in zigzag "
            "over 8 devices; pass a multiple of 1024",
        ),
    ],
)
def test_wrong_arguments(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.parse(["--reproducible", *arguments])
    assert message in capsys.readouterr().err
