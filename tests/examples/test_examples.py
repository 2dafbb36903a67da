"""The examples, and the code of the README and the site, run and print the right lines."""

import re
import sys
from pathlib import Path

import pytest

from tests.jobs import ended_well, inherited

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md")))
}

# Lines that each example must print, as patterns without values that depend on rounding.
EXAMPLES = {
    "00_tour.py": (
        r"3\. butterfly: 3 collective-permute",
        r"5\. five tokens in a cache, by device: \[1 1 1 1 1 0 0 0\]",
        r"7\. 4096 chips, 33 million keys: 12 messages, one after another",
    ),
    "01_order_does_not_matter.py": (
        r"random order +576 bytes of state, .*",
        r"two keys would share one\. 1024 keys: 10 bits\.",
        r"causal mask +wrong, .*",
        r"The order of the keys does not matter; their positions do\.",
    ),
    "02_eight_devices_random_order.py": (
        r"butterfly +3 collective-permute .*",
        r"psum +2 all-reduce .*",
        r"all_gather +1 all-gather .*",
        r"Eight devices in random order give the result of one device\.",
    ),
    "03_gradient.py": (
        r"forward moves +\{'collective-permute': 3\}",
        r"backward moves +\{'all-reduce': 1\}: .*",
        r"The gradients are those of jax\.nn, .*",
    ),
    "04_inside_shard_map.py": (
        r"jax\.shard_map\(\.\.\., check_vma=True\), .*",
        r"jax\.shard_map\(\.\.\., check_vma=False\), .*",
        r"Inside your own shard_map attention is the same, forward and backward\.",
    ),
    "05_separate_orders.py": (
        r".*outside jit: .*value_positions has \d+ more than once.*",
        r"a value right after its key +at most +1 waited, .*",
        r"all keys, then all values +at most +256 waited, .*",
        r"Pairs cost their positions; .*",
    ),
    "10_restart_on_fewer.py": (
        r"distattn launch: rank 2 was killed by SIGKILL after .*",
        r"continues after 10 tokens, on 4 devices",
        r"told to end: saved",
        r"continues after \d+ tokens, on 3 devices",
        r"Killed, preempted and moved, the job gave the undisturbed answer\.",
    ),
    "09_survive_a_host.py": (
        r"lost rank 2; detected after [\d.]+ s",
        r"positions lost: none",
        r"positions lost: \[4, 5, 12, 13, .*",
        r"on 6 devices, next token after [\d.]+ s",
        r"A host was lost, and no token of the answer changed\.",
    ),
}
# tests/examples/test_language_model.py, tests/examples/test_generation.py and
# tests/examples/test_training.py
TESTED_ELSEWHERE = {"06_language_model.py", "07_generate.py", "08_train.py"}

# Each block of Python, and the block of text after it that it prints, by file and number.
BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {
    f"{name}:{number}": block
    for name, text in TEXTS.items()
    for number, block in enumerate(BLOCK.findall(text))
}


def printed(*arguments: str, optimized: bool = False) -> str:
    """Return the output of Python with these arguments; warnings are errors.

    It inherits the XLA flags of the tests' process, with which XLA compiles faster, unless `optimized`.
    """
    env = inherited("PYTHONHOME", *(["XLA_FLAGS"] if optimized else [])) | {"PYTHONPATH": str(ROOT)}
    return ended_well([sys.executable, "-W", "error", *arguments], env=env, timeout_s=120).stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    lines = [line.strip() for line in printed(f"examples/{name}").splitlines()]
    for pattern in EXAMPLES[name]:
        assert any(re.fullmatch(f".*{pattern}", line) for line in lines), (pattern, lines)


def test_no_example_is_left_out():
    numbered = {path.name for path in (ROOT / "examples").glob("[0-9]*.py")}
    assert numbered == {*EXAMPLES, *TESTED_ELSEWHERE}
    assert all(f"`examples/{name}`" in README for name in numbered)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_of_the_readme_and_the_site(block):
    code, text = BLOCKS[block]
    # Users compile for speed, and reproducibility must hold there.
    assert printed("-c", code, optimized="reproducible=True" in code) == text


def test_every_block_of_python_is_run():
    assert len(BLOCKS) == sum(text.count("```python") for text in TEXTS.values())
    assert {"README.md:0", "docs/pages/why.md:0"} <= set(BLOCKS)


def test_no_block_stands_twice():
    assert len({code for code, _ in BLOCKS.values()}) == len(BLOCKS)
