"""Measured block sizes: the script that times them, the table, and the programs that read it."""

import dataclasses
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import distattn
from distattn.local.kernels import shared
from distattn.local.kernels.tpu import tiling
from distattn.testing import interpreted
from tests.jobs import ROOT

TINY = "--batch 1 --heads 2 --kv-heads 1 --context 300 --widths 8 --dtypes float32 --repeats 1"
ROW = {
    "chip": "v5e",
    "kind": "decode",
    "width": 128,
    "dtype": "bfloat16",
    "row_block": 16,
    "key_block": 512,
    "seconds": 2e-4,
    "jax": "0.10.2",
    "date": "2026-01-31",
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    import block_sizes

    yield block_sizes
    for name in ("block_sizes", "samples"):
        del sys.modules[name]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table."""
    path = tmp_path / "block_sizes.json"
    path.write_text("[]")
    monkeypatch.setattr(shared, "MEASURED", path)
    shared._measured.cache_clear()
    yield path
    shared._measured.cache_clear()


def key_blocks():
    """Number of key blocks of a call that was not traced before."""
    struct = jax.ShapeDtypeStruct
    query, key = struct((1, 1, 2, 8), jnp.float32), struct((1, 300, 1, 8), jnp.float32)

    def call(query, key):
        return distattn.partial_attention(query, key, key, implementation="pallas_tpu")

    with interpreted():
        text = str(jax.make_jaxpr(call)(query, key))
    parts, *_, steps = map(int, re.search(r"grid=\(([\d, ]+)\)", text)[1].split(","))
    return parts * steps


def test_measured_sizes_are_those_of_programs(script, table, monkeypatch, capsys):
    by_turns = script.interleaved_medians

    def faster(programs, *arguments):
        return by_turns(programs, *arguments) | {(16, 128): 1e-9}

    monkeypatch.setattr(script, "interleaved_medians", faster)
    assert key_blocks() == 1
    script.main([*TINY.split(), "--kinds", "decode", "--interpret", "--write"])
    printed = capsys.readouterr().out
    assert "cpu: decode, B=1 T=1 S=300 N=2 K=1 H=8 float32, median of 1" in printed
    assert len(re.findall(r"16 rows x +(128|256|384) keys +[\d.]+ ms", printed)) == 3
    assert "384 keys" in next(x for x in printed.splitlines() if "library's choice" in x)
    (row,) = json.loads(table.read_text())
    call = {"chip": "cpu", "kind": "decode", "width": 8, "dtype": "float32"}
    assert row | call | {"row_block": 16, "key_block": 128, "jax": jax.__version__} == row
    assert row["seconds"] > 0
    shared._measured.cache_clear()
    assert key_blocks() == 4  # 3 of 128 keys; each of two parts steps over 2


def test_gradients_are_timed_too(script, table, capsys):
    tiny = [*TINY.split(), "--kinds", "gradient", "--tokens", "40", "--interpret"]
    script.main(tiny)
    assert re.search(r"gradient, B=1 T=40 .*\n +\d+ rows x +128 keys", capsys.readouterr().out)
    assert json.loads(table.read_text()) == []


@pytest.mark.parametrize(
    ("arguments", "kind", "error"),
    [
        ("", SystemExit, "nothing to time, JAX sees only a CPU.*--interpret"),
        (
            "--interpret --heads 3 --kv-heads 2",
            SystemExit,
            "--heads 3 is no multiple of --kv-heads 2",
        ),
        (
            "--interpret --kinds prefill --tokens 9",
            ValueError,
            "18 rows count as 'decode'.*--tokens",
        ),
        (
            "--interpret --dtypes float64",
            NotImplementedError,
            "dtype float64; supported are bfloat16",
        ),
    ],
)
def test_wrong_calls(script, arguments, kind, error, capsys):
    with jax.enable_x64(), pytest.raises(kind) as caught:
        script.main([*TINY.split(), *arguments.split()])
    assert re.search(error, str(caught.value) + capsys.readouterr().err)


def test_a_row_replaces_that_of_the_same_call(script, table):
    def measured(width=128, dtype=jnp.bfloat16, rows=1, chip="v5e", *, backward=False):
        shared._measured.cache_clear()
        config = types.SimpleNamespace(queries=rows, groups=1, width=width)
        return shared.measured_blocks(chip, config, jnp.dtype(dtype), backward=backward)

    script.write([ROW])
    assert measured() == (16, 512)
    others = [{"chip": "v5p"}, {"rows": 129}, {"backward": True}, {"width": 64}]
    assert {measured(**other) for other in [*others, {"dtype": jnp.int8}]} == {None}
    script.write([ROW | {"key_block": 256}, ROW | {"width": 64}])
    assert measured() == (16, 256)
    assert measured(64) == (16, 512)
    assert len(json.loads(table.read_text())) == 2


def test_the_table_of_the_library_is_read():
    for row in json.loads(shared.MEASURED.read_text(encoding="utf-8")):
        assert set(row) == set(ROW)
    assert shared._measured() is not None


def test_measured_sizes_are_halved_if_there_is_no_room():
    config = tiling.TpuTileConfig(
        batch=1,
        queries=1024,
        keys=4096,
        kv_heads=8,
        groups=4,
        width=128,
        value_width=128,
        row_block=16,
        key_block=128,
        chip=tiling.CHIPS[1],
        heads=1,
        itemsize=2,
        key_itemsize=2,
    )
    chosen = config.chosen(measured=(512, 2048))
    assert (chosen.row_block, chosen.key_block) == (512, 2048)
    more = dataclasses.replace(config, heads=8, itemsize=4, key_itemsize=4, chip=tiling.V4)
    chosen = more.chosen(measured=(512, 2048))
    assert chosen.vmem_bytes <= tiling.V4.budget_bytes
    assert (chosen.row_block, chosen.key_block) != (512, 2048)


def test_chips_and_kinds():
    assert shared.chip_name("TPU v5 lite") == "v5e"
    assert shared.chip_name("NVIDIA H100 80GB HBM3") == "h100"
    assert shared.chip_name("TPU v9") == "TPU v9"
    kinds = [shared.call_kind(rows, backward=False) for rows in (1, 128, 129)]
    assert kinds == ["decode", "decode", "prefill"]
    assert shared.call_kind(1, backward=True) == "gradient"
