"""The examples and the README's code run as they stand, and say what they are there to say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Lines that each must print, as patterns; numbers that depend on rounding are left out.
EXAMPLES = {
    "01_order_does_not_matter.py": (
        r"random order +576 bytes of state, .*",
        r"two keys would share one\. 1024 keys: 10 bits\.",
        r"causal mask +wrong, .*",
        r"The order of the keys does not matter; their names do\.",
    ),
    "02_eight_devices_random_order.py": (
        r"butterfly +3 collective-permute .*",
        r"psum +2 all-reduce .*",
        r"all_gather +1 all-gather .*",
        r"Eight devices in random order say what one device says\.",
    ),
    "03_gradient.py": (
        r"forward moves +\{'collective-permute': 3\}",
        r"backward moves +\{'all-reduce': 1\}: .*",
        r"The gradients are those of jax\.nn, .*",
    ),
    "04_inside_shard_map.py": (
        r"jax\.shard_map\(\.\.\., check_vma=True\), .*",
        r"jax\.shard_map\(\.\.\., check_vma=False\), .*",
        r"Inside one's own shard_map it is the same attention, forward and backward\.",
    ),
    "05_separate_orders.py": (
        r".*outside jit: .*value_positions has \d+ more than once.*",
        r"a value right after its key +at most +1 waited, .*",
        r"all keys, then all values +at most +256 waited, .*",
        r"Pairs cost their names; .*",
    ),
    "10_restart_on_fewer.py": (
        r"distattn launch: rank 2 was killed by SIGKILL after .*",
        r"goes on behind 10 tokens, on 4 devices",
        r"was told to end: saved, and ends",
        r"goes on behind \d+ tokens, on 3 devices",
        r"Killed, preempted and moved, it said what the undisturbed one said\.",
    ),
    "09_survive_a_host.py": (
        r"lost rank 2; known after [\d.]+ s",
        r"positions lost: none",
        r"positions lost: \[4, 5, 12, 13, .*",
        r"on 6 devices, next token after [\d.]+ s",
        r"A host was lost, and no token of the answer changed\.",
    ),
}
# tests/test_language_model.py, tests/test_generation.py and tests/test_training.py
TESTED_ELSEWHERE = {"06_language_model.py", "07_generate.py", "08_train.py"}

# Each block of Python, and the block of text behind it with what it prints.
BLOCKS = re.findall(
    r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", README, re.DOTALL | re.MULTILINE
)


def printed(*arguments: str) -> str:
    """What Python prints for these arguments, where warnings are errors.

    Nothing else is set, but for the flags of the tests' own process, with which XLA compiles faster.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONHOME" and not name.startswith("JAX_")
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    lines = [line.strip() for line in printed(f"examples/{name}").splitlines()]
    for pattern in EXAMPLES[name]:
        assert any(re.fullmatch(f".*{pattern}", line) for line in lines), (pattern, lines)


def test_no_example_is_left_out():
    numbered = {path.name for path in (ROOT / "examples").glob("[0-9]*.py")}
    assert numbered == {*EXAMPLES, *TESTED_ELSEWHERE}
    assert all(f"`examples/{name}`" in README for name in numbered)


@pytest.mark.parametrize(("code", "text"), BLOCKS, ids=range(len(BLOCKS)))
def test_readme_code(code, text):
    assert printed("-c", code) == text


def test_every_block_of_python_in_the_readme_is_run():
    assert len(BLOCKS) == README.count("```python") > 0


def test_every_file_that_the_readme_names_exists():
    names = set(re.findall(r"\b(?:distattn|examples|scripts|tests)/\w[\w/.]*\w", README))
    assert {name for name in names if not (ROOT / name).exists()} == set()
    assert "tests/test_attention.py" in names
