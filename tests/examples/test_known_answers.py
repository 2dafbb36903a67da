"""How far the model is from what others published, and that it is said in numbers."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "scripts" / "bench"))

import known_answers  # noqa: E402


@pytest.mark.parametrize("devices", [2, 7, 8, 128])
@pytest.mark.parametrize("kv_heads", [16, 4])
def test_volumes_of_tree_attention(devices, kv_heads):
    tree, butterfly, ring = known_answers.volumes(devices, 1000, 16, kv_heads)
    assert tree.ratio == pytest.approx(1)  # one packed state is max, sum and weighted sum
    rounds = math.ceil(math.log2(devices))  # of the busiest device, one state in each
    assert butterfly.ratio == pytest.approx(rounds / (2 * (devices - 1) / devices))
    # One hop fewer, and the heads that keys have.
    assert ring.ratio == pytest.approx((devices - 1) / devices * kv_heads / 16)


def test_a_ring_of_128_gpus_is_predicted_far_slower_than_was_published():
    found = known_answers.speedup()
    assert found.published == 8
    assert 300 < found.ratio < 1000
    # Independent of the constants of the model: bytes of all keys and values over the fastest card.
    passing_s = 5_120_000 * 127 / 128 * 2 * 2048 * 2 / 50e9
    assert passing_s > 0.8


def test_table_1_by_parts():
    rows = known_answers.table_1()
    for row in rows:
        tree, ring = row.answers
        # The prompt is most of it, so the factor is that of the prompt.
        assert 1 / 2 < tree.ratio < 2.6
        assert 1 / 6.1 < ring.ratio < 1
        # The direction is right, and the distance is not.
        assert ring.model > tree.model
        assert ring.published - tree.published > 6 * (ring.model - tree.model)
    assert rows[-1].prompt_s == pytest.approx(64 * rows[0].prompt_s, rel=0.1)


def test_all_answers_are_printed(capsys):
    known_answers.main()
    out = capsys.readouterr().out
    assert "| v5p:16x16x16, 4096 devices, us | 60.35 | 62 | 0.973 |" in out
    assert "| psum beside V_tree, 128 devices | 4128 | 4128 | 1 |" in out
    assert out.count("\n| ") == 5 + 4 + 1 + 8 + 1 + 4
