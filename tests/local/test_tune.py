"""Block sizes that are measured: `distattn bench kernels --tune`, its file, and who reads it."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

import distattn
from distattn.cli import main, tuning
from distattn.cli.check.runner import medians
from distattn.local.kernels import tuned
from distattn.local.kernels.tpu import tiling
from distattn.testing import interpreted

ROW = tuned.Measured("v5e", "decode", 128, "bfloat16", 16, 512, 2e-4, "0.10.2", "2026-01-31")
TINY = "--batch 1 --heads 2 --kv-heads 1 --context 300 --widths 8 --dtypes float32 --repeats 1"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that is not there yet, named by the environment variable."""
    path = tmp_path / "sizes.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    return path


def bench(*arguments):
    return main(["bench", "kernels", *TINY.split(), *arguments])


def blocks_of_keys():
    """How many a call has that was not traced before."""
    struct = jax.ShapeDtypeStruct
    query, key = struct((1, 1, 2, 8), jnp.float32), struct((1, 300, 1, 8), jnp.float32)

    def call(query, key):
        return distattn.partial_attention(query, key, key, implementation="pallas_tpu")

    with interpreted():
        text = str(jax.make_jaxpr(call)(query, key))
    parts, *_, steps = map(int, re.search(r"grid=\(([\d, ]+)\)", text)[1].split(","))
    return parts * steps


def test_what_is_measured_is_what_programs_have(file, monkeypatch, capsys):
    def faster(programs, repeats):
        return medians(programs, repeats) | {"(16, 128)": 1e-9}

    monkeypatch.setattr(tuning, "medians", faster)
    # The variable names one that is not there.
    with pytest.raises(ValueError, match="No such file"):
        blocks_of_keys()
    monkeypatch.delenv(tuned.VARIABLE)
    assert blocks_of_keys() == 1
    assert bench("--kinds", "decode", "--interpret", "--tune", str(file)) == 0
    printed = capsys.readouterr().out
    assert re.search(r"cpu: decode, B=1 T=1 S=300 N=2 K=1 H=8 float32, median of 1", printed)
    assert len(re.findall(r"16 rows x +(128|256|384) keys +[\d.]+ ms", printed)) == 3
    assert "384 keys" in next(x for x in printed.splitlines() if "own choice" in x)
    (row,) = json.loads(file.read_text())["block_sizes"]
    assert row["seconds"] > 0
    wanted = {
        "chip": "cpu",
        "kind": "decode",
        "width": 8,
        "dtype": "float32",
        "rows": 16,
        "keys": 128,
    }
    assert {name: row[name] for name in wanted} == wanted
    assert row["jax"] == jax.__version__
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    assert blocks_of_keys() == 4  # 3 of 128 keys; each of two parts steps over 2


def test_without_an_accelerator_there_is_nothing_to_time(capsys):
    assert bench() == 2
    error = capsys.readouterr().err
    assert "nothing to time, JAX sees no accelerator here, only a CPU" in error
    assert "--interpret" in error


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ("--interpret", "--kinds", "gradient", "--dtypes", "int8"),
            "8 bits have no gradient; pass",
        ),
        (("--heads", "3", "--kv-heads", "2"), "--heads 3 is no multiple of --kv-heads 2; pass one"),
        (
            ("--interpret", "--kinds", "prefill", "--tokens", "9"),
            "9 queries of 2 heads.*pass fewer",
        ),
        (
            ("--interpret", "--kinds", "decode", "--dtypes", "float64"),
            "has dtype float64; done are bfloat16",
        ),
    ],
)
def test_wrong_calls(arguments, error, capsys):
    with jax.enable_x64():
        assert bench(*arguments) == 2
    assert re.search(error, capsys.readouterr().err.replace("\n", " "))


def test_a_file_that_is_none_is_left_alone(file, capsys):
    file.write_text("[]")
    assert bench("--interpret", "--tune", str(file)) == 2
    assert "has no list 'block_sizes'" in capsys.readouterr().err
    assert file.read_text() == "[]"


def test_rows_are_found_by_all_that_they_are_of(file, monkeypatch):
    call = "v5e", "decode", 128, jnp.bfloat16
    tuned.write(file, [ROW])
    assert tuned.tuned(*call) == (16, 512)
    for other in (
        ("v5p", *call[1:]),
        ("v5e", "prefill", *call[2:]),
        ("v5e", "decode", 64, call[3]),
    ):
        assert tuned.tuned(*other) is None
    assert tuned.tuned(*call[:3], jnp.int8) is None
    # Written again, other calls stay, and what was read before is not kept.
    tuned.write(file, [dataclasses.replace(ROW, keys=256), dataclasses.replace(ROW, width=64)])
    assert tuned.tuned(*call) == (16, 256)
    assert {x.width for x in tuned.read(file)} == {64, 128}
    monkeypatch.delenv(tuned.VARIABLE)
    assert tuned.tuned(*call) is None
    assert tuned.tuned(*call, path=file) == (16, 256)


BAD = {
    "text": ("sizes", "is not JSON"),
    "no list": ({"block_sizes": {}}, "has no list 'block_sizes'"),
    "no object": ({"block_sizes": [7]}, "has a row 0 in 'block_sizes' that is 7"),
    "missing": (
        {"block_sizes": [{}]},
        "field 'chip' of row 0 is missing; it must be the name of a chip",
    ),
    **{
        f"{name} {value}": (
            {"block_sizes": [dataclasses.asdict(ROW), dataclasses.asdict(ROW) | {name: value}]},
            f"field '{name}' of row 1 is {value!r}; it must be ",
        )
        for name, value in {
            "chip": "",
            "kind": "training",
            "width": 0,
            "dtype": "float17",
            "rows": 16.5,
            "keys": True,
            "seconds": -1,
            "jax": None,
            "date": "yesterday",
        }.items()
    },
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_the_field(name, file):
    content, error = BAD[name]
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(error)) as caught:
        tuned.tuned("v5e", "decode", 128, jnp.bfloat16)
    assert str(file) in str(caught.value)
    assert f"Remove it and write it anew by `distattn bench kernels --tune {file}`" in str(
        caught.value
    )


def test_measured_sizes_are_taken_where_there_is_room():
    shape = tiling.Shape(4096, 4, 4096, heads=1, width=128, value_width=128, itemsize=2)
    target = tiling.TARGETS[1]
    assert tiling.sizes(shape, target, measured=(512, 2048)) == (512, 2048)
    more = dataclasses.replace(shape, heads=8, itemsize=4)
    rows, keys = tiling.sizes(more, tiling.V4, measured=(512, 2048))
    assert tiling.vmem_bytes(more, rows, keys) <= tiling.V4.budget_bytes
    assert (rows, keys) != (512, 2048)


def test_chips_and_kinds():
    assert tuned.chip_name("TPU v5 lite") == "v5e"
    assert tuned.chip_name("NVIDIA H100 80GB HBM3") == "h100"
    assert tuned.chip_name("TPU v9") == "TPU v9"
    assert [tuned.kind_of(n, backward=False) for n in (1, 128, 129)] == ["decode"] * 2 + ["prefill"]
    assert tuned.kind_of(1, backward=True) == "gradient"
