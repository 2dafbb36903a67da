"""Many devices on a laptop, and what a compiled program sends between devices."""

import re
from collections import Counter
from collections.abc import Iterator

import jax

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "all-to-all",
    "ragged-all-to-all",
    "send",
    "recv",
)

# `%name = shape opcode(operands), attributes`. Layouts hold parentheses (`{1,0:T(8,128)}`), but
# only the opcode has a space before its name and a parenthesis behind it.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<shape>.*?) (?P<opcode>[a-z][a-z\-]*)\(")
# `%name (arguments) -> shape {`, and what an instruction calls: `body=%name`, `calls=%name`,
# `branch_computations={%name, %name}`; how often a loop runs is in its backend_config.
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLS = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(?P<count>\d+)"\}')
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<dimensions>[\d,<= ]*)\]")


def fake_devices(count: int) -> None:
    """Makes this process see `count` CPU devices and no others.

    Must come before JAX is first used: the number of devices is fixed from then on. Does not itself
    start JAX, so `jax.distributed.initialize` may follow. Wins over the number in `XLA_FLAGS`.

    Args:
      count: number of devices, at least 1.

    Raises:
      ValueError: if `count` is not a positive number.
      RuntimeError: if JAX already runs with other devices.
    """
    if count < 1:
        raise ValueError(
            f"count={count} fake devices; a process needs at least 1: pass a positive int"
        )
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except (
        RuntimeError
    ) as late:  # from here on JAX runs, so asking it for its devices starts nothing
        devices = jax.devices()
        if len(devices) != count or devices[0].platform != "cpu":
            raise RuntimeError(
                f"fake_devices({count}) comes too late: JAX already runs with {len(devices)} "
                f"{devices[0].platform} device(s). Call it before the process first uses JAX"
            ) from late
    jax.config.update("jax_platforms", "cpu")


def collectives(hlo_text: str, *, executed: bool = False) -> Counter[str]:
    """How many of each collective operation a compiled program holds, or runs.

    An operation in two halves (`all-gather-start`, `all-gather-done`) counts once, under its plain
    name.

    Args:
      hlo_text: optimised HLO, from `jax.jit(f).lower(...).compile().as_text()`.
      executed: count what is in the body of a loop as often as the loop runs, where XLA knows that;
        else once.

    Returns:
      Counter from the name of the operation, as XLA writes it, to its number; those that do not
      occur are absent.
    """
    total: Counter[str] = Counter()
    for kind, _, times in _collectives(hlo_text):
        total[kind] += times if executed else 1
    return total


def collective_bytes(hlo_text: str, *, executed: bool = False) -> dict[str, int]:
    """The size of what each kind of collective operation leaves on one device.

    That is the result, not the traffic: what crosses the links for it depends on the algorithm (a
    ring all-gather sends (D-1)/D of its result per device, a permute all of it).

    Args:
      hlo_text: optimised HLO, from `jax.jit(f).lower(...).compile().as_text()`.
      executed: as in `collectives`.

    Returns:
      Dict from the name of the operation to the bytes of its results per device, summed over its
      occurrences in the text, or over its runs.
    """
    total: Counter[str] = Counter()
    for kind, shape, times in _collectives(hlo_text):
        total[kind] += _size_bytes(shape) * (times if executed else 1)
    return dict(total)


def _runs(hlo_text: str) -> dict[str, int]:
    """How often each computation runs in one run of the program, as far as XLA knows; 1 for the entry."""
    callers: dict[str, tuple[str, int]] = {}
    computation = ""
    for line in hlo_text.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start["name"]
        trips = _TRIPS.search(line)
        for attribute, names in _CALLS.findall(line):
            times = int(trips["count"]) if trips and attribute == "body" else 1
            callers.update((name.strip(" {%}"), (computation, times)) for name in names.split(","))

    def runs(name: str) -> int:
        caller, times = callers.get(name, ("", 1))
        return times * runs(caller) if caller else times

    return {name: runs(name) for name in callers}


def _collectives(hlo_text: str) -> Iterator[tuple[str, str, int]]:
    """The kind, the text of the result's shape, and the number of runs, of each collective."""
    runs = _runs(hlo_text)
    computation = ""
    for line in hlo_text.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start["name"]
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        shape, opcode = match["shape"], match["opcode"]
        kind = opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if kind in ("send", "recv"):
            shape = _elements(shape)[0]  # (data, context, token)
        elif opcode != kind and kind != "all-reduce":
            shape = _elements(shape)[
                1
            ]  # (operand, result, contexts); all-reduce-start has the result
        yield kind, shape, runs.get(computation, 1)


def _elements(shape: str) -> list[str]:
    """The parts of a tuple shape, split at the commas that are inside no other bracket."""
    parts, depth = [""], 0
    for character in shape.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _size_bytes(shape: str) -> int:
    """The bytes of an array shape or of all arrays in a tuple shape."""
    total = 0
    for array in _ARRAY.finditer(shape):
        bits = int(array["bits"] or 8)  # pred takes a byte
        for dimension in array["dimensions"].split(","):
            bits *= int(dimension.strip("<= ") or 1)
        total += -(-bits // 8)
    return total
