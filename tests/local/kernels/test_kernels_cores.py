"""Keys in two parts, so that both cores of a v4 or v5p work: right, in one kernel, where it pays."""

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

import distattn
from distattn.local.kernels.tpu import tiling
from distattn.local.kernels.tpu.tiling import CHIPS, V4
from distattn.testing import interpreted
from tests.cases import Case, check
from tests.kernel_calls import arrays_like_keys, compiled, launches

# One block of rows and of heads; 3 and 5 blocks of 128 keys.
ODD = {
    "three blocks": Case(
        batch=1, queries=2, keys=300, permuted=True, empty_slots=40, options=(("is_causal", True),)
    ),
    # Rows of the batch visit different numbers of blocks, one of them a single one.
    "lengths": Case(batch=3, queries=1, keys=600, lengths=True, seed=5),
}


def in_blocks(**arguments):
    state = distattn.partial_attention(
        **arguments, implementation="pallas_tpu", block_sizes=(64, 128)
    )
    return distattn.finalize(state)


@pytest.mark.parametrize("name", ODD)
def test_two_parts(name, monkeypatch):
    counted = []
    key_parts = tiling.key_parts
    monkeypatch.setattr(
        "distattn.local.kernels.tpu.tiling.key_parts",
        lambda *x: counted.append(key_parts(*x)) or counted[-1],
    )
    with interpreted(pltpu.InterpretParams()):
        check(ODD[name], in_blocks, what=f"two parts, {name}")
    assert set(counted) == {2}


def test_only_where_cores_would_idle():
    two_cores = {x.name for x in CHIPS if tiling.key_parts(x, 1, 64) == 2}
    assert two_cores == {"v4", "v5p"}
    found = [tiling.key_parts(V4, steps, 64) for steps in range(1, 13)]
    assert found == [2, 1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1]
    assert tiling.key_parts(V4, 1, 1) == 1  # one block of keys is not cut


@pytest.mark.parametrize("target", ["v4:2x2x1", "v5p:2x2x1"])
def test_compiled_for_two_cores(target):
    report = compiled(target, "decode_alone", 128, jnp.bfloat16)
    assert launches(report) == 1
    assert arrays_like_keys(report, "decode_alone", 128) == []
    assert "f32[2,8,16,128]" in report.hlo  # a state of each part
