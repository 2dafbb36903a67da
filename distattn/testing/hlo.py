"""Collectives of a compiled program, counted in the text of its HLO."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

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

# `%name = shape opcode(inputs), attributes`. Layouts hold parentheses (`{1,0:T(8,128)}`), but
# only the opcode has a space before its name and a parenthesis behind it.
_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][a-z\-]*)\((?P<rest>.*)$"
)
# `%name (arguments) -> shape {`, and before any optimisation `name {`.
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*)?\{$")
# Calls of an instruction: `body=%name`, `calls=%name`, `branch_computations={%name, %name}`.
_CALLS = re.compile(
    r"\b(body|condition|calls|to_apply|called_computations|true_computation|false_computation"
    r"|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_OPERAND = re.compile(r"%?([A-Za-z_][\w.\-]*)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')
_TARGETS = re.compile(r"_xla_megascale_target=\{((?:\{\d+->\d+\},?)*)\}")
_INDEX = re.compile(r"\bindex=(\d+)")
_NUMBER = re.compile(r"^(-?\d+)\)")
_GROUPS = re.compile(r"\breplica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<dimensions>[\d,<= ]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collective operation in the text; its two halves (start, done) are one, a send is another."""

    kind: str  # one of KINDS
    result_bytes: int  # size of its result on one device; size of the message of a send
    runs: int  # number of runs in one run of the program, if the text says how often loops run
    partners: np.ndarray | None  # int[P, Q], ranks; each row is a group; None if unknown
    by_id: bool = False  # True if partners are ids of devices, not ranks

    def axes(self, sizes: Mapping[str, int], ids: Sequence[int] = ()) -> tuple[str, ...]:
        """Return the axes of a mesh along which it communicates.

        Args:
          sizes: sizes of all axes of the mesh by name; ranks count devices row by row.
          ids: ids of the devices in this order, if known.
        """
        names, shape = tuple(sizes), tuple(sizes.values())
        if self.partners is None or (self.by_id and not len(ids)):
            return tuple(name for name in names if sizes[name] > 1)
        if not self.partners.size:
            return ()
        ranks = self.partners
        if self.by_id:
            order = np.argsort(ids)
            ranks = order[np.searchsorted(np.asarray(ids)[order], ranks)]
        places = np.unravel_index(ranks, shape)
        return tuple(
            name for name, place in zip(names, places, strict=True) if (place != place[:, :1]).any()
        )


@dataclasses.dataclass
class _Instruction:
    name: str
    opcode: str
    shape: str
    rest: str  # inputs and attributes
    root: bool  # True if it is the result of its computation

    @functools.cached_property
    def kind(self) -> str | None:
        """Kind of the collective that begins here, or None."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in KINDS else None

    @functools.cached_property
    def calls(self) -> dict[str, list[str]]:
        """Names of called computations, by attribute."""
        found: dict[str, list[str]] = {}
        for attribute, names in _CALLS.findall(self.rest):
            found.setdefault(attribute, []).extend(n.strip(" {%}") for n in names.split(","))
        return found

    @functools.cached_property
    def inputs(self) -> list[str]:
        """Names of the instructions that are inputs."""
        depth, end = 1, len(self.rest)
        for end, character in enumerate(self.rest):  # noqa: B007
            depth += (character == "(") - (character == ")")
            if depth == 0:
                break
        return _OPERAND.findall(self.rest[:end])

    def attribute(self, pattern: re.Pattern[str]) -> str | None:
        """Return the group of a pattern among the attributes, or None."""
        match = pattern.search(self.rest)
        return match[1] if match else None

    @property
    def rendezvous(self) -> str | None:
        """Name that a send and its receive share."""
        return self.attribute(_RENDEZVOUS) or self.attribute(_CHANNEL)


class Program:
    """Computations of a program, parsed once."""

    def __init__(self, text: str):
        """Parse the text of HLO, optimised or not."""
        self.entry: str = ""
        body: dict[str, _Instruction] = {}
        # The name of a fragment of a text is "".
        self.computations: dict[str, dict[str, _Instruction]] = {"": body}
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                body = self.computations.setdefault(start["name"], {})
                self.entry = start["name"] if start["entry"] else self.entry
            elif match := _INSTRUCTION.match(line):
                fields = (match[x] for x in ("name", "opcode", "shape", "rest"))
                body[match["name"]] = _Instruction(*fields, root=bool(match["root"]))
        self._callers: dict[str, list[tuple[str, int]]] = {}
        for name, body in self.computations.items():
            for x in body.values():
                for callee, times in self._calls(name, x):
                    self._callers.setdefault(callee, []).append((name, times))
        self._depths: dict[str, int] = {}

    def collectives(self) -> Iterator[Collective]:
        """Yield each collective operation of the text."""
        for name, body in self.computations.items():
            for x in body.values():
                if x.kind is not None:
                    by_id = x.attribute(_TARGETS) is not None
                    yield Collective(
                        x.kind, _result_bytes(x), self._runs(name), _partners(x), by_id
                    )

    @property
    def rounds(self) -> int:
        """Number of collectives in the longest chain that wait for one another, in one run.

        A send and its receive count once: the receive waits for the partner's send, which the same
        program makes at the same place.
        """
        return self._depth(self.entry)

    def _depth(self, name: str) -> int:
        if name not in self._depths:
            known: dict[str, int] = {}
            sent: dict[str | None, int] = {}
            for x in self.computations.get(name, {}).values():  # instructions follow their inputs
                before = max((known.get(y, 0) for y in x.inputs), default=0)
                if x.kind == "send":
                    sent[x.rendezvous] = before
                elif x.kind == "recv":
                    before = max(before, sent.get(x.rendezvous, 0))
                inside = [0, *(self._depth(callee) * n for callee, n in self._calls(name, x))]
                depth = sum(inside) if x.opcode == "while" else max(inside)
                known[x.name] = before + (x.kind not in (None, "send")) + depth
            self._depths[name] = max(known.values(), default=0)
        return self._depths[name]

    def _runs(self, name: str) -> int:
        callers = self._callers.get(name)
        return sum(times * self._runs(caller) for caller, times in callers) if callers else 1

    def _calls(self, name: str, x: _Instruction) -> Iterator[tuple[str, int]]:
        """Yield the computations that an instruction calls, and how often."""
        for attribute, callees in x.calls.items():
            times = self._trips(name, x) if attribute == "body" else 1
            yield from ((callee, times) for callee in callees)

    def _trips(self, name: str, loop: _Instruction) -> int:
        """Return the iterations of a loop, from XLA or from its counter's constant limit; else 1."""
        if (known := loop.attribute(_TRIPS)) is not None:
            return int(known)
        condition = self.computations.get(loop.calls.get("condition", [""])[0], {})
        root = next((x for x in condition.values() if x.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
            return 1
        counter, limit = (condition.get(x) for x in root.inputs)
        if counter is None or limit is None or counter.opcode != "get-tuple-element":
            return 1
        last, first = limit.attribute(_NUMBER), None
        around = self.computations[name]
        carried = around.get(loop.inputs[0]) if loop.inputs else None
        if carried is not None and carried.opcode == "tuple":
            start = around.get(carried.inputs[int(counter.attribute(_INDEX) or 0)])
            while start is not None and start.opcode in ("copy", "bitcast"):
                start = around.get(start.inputs[0])
            first = None if start is None else start.attribute(_NUMBER)
        return 1 if last is None else max(int(last) - int(first or 0), 0)


def collectives(hlo_text: str, *, executed: bool = False) -> Counter[str]:
    """Count each kind of collective operation in a compiled program.

    An operation in two halves (`all-gather-start`, `all-gather-done`) counts once, by its plain name.

    Args:
      hlo_text: optimised HLO, from `jax.jit(f).lower(...).compile().as_text()`.
      executed: count an operation in a loop once per iteration, if XLA knows their number.

    Returns:
      Counter from the name of the operation in XLA to its number; absent if 0.
    """
    total: Counter[str] = Counter()
    for x in Program(hlo_text).collectives():
        total[x.kind] += x.runs if executed else 1
    return total


def collective_bytes(hlo_text: str, *, executed: bool = False) -> dict[str, int]:
    """Sum the sizes of the results of each kind of collective operation on one device.

    The traffic on the links depends on the algorithm: a ring all-gather sends (D-1)/D of its result
    per device, a permute all of it.

    Args:
      hlo_text: as for `collectives`.
      executed: as for `collectives`.

    Returns:
      Dict from the name of the operation in XLA to bytes per device.
    """
    total: Counter[str] = Counter()
    for x in Program(hlo_text).collectives():
        total[x.kind] += x.result_bytes * (x.runs if executed else 1)
    return dict(total)


def _result_bytes(x: _Instruction) -> int:
    shape = x.shape
    if x.kind in ("send", "recv"):
        shape = _elements(shape)[0]  # (data, context, token)
    elif x.opcode != x.kind and x.kind != "all-reduce":
        shape = _elements(shape)[1]  # (operand, result, contexts); all-reduce-start has the result
    return _size_bytes(shape)


def _partners(x: _Instruction) -> np.ndarray | None:
    for pattern in (_PAIRS, _TARGETS):
        if (pairs := x.attribute(pattern)) is not None:
            return np.array(re.findall(r"\d+", pairs), np.int64).reshape(-1, 2)
    text = x.attribute(_GROUPS)
    if text is None or text == "{}":
        return None
    if text.startswith("{"):
        groups = re.findall(r"\{([\d, ]+)\}", text)
        return np.array([group.split(",") for group in groups], np.int64)
    shape, sizes, order = (  # iota groups: [4,2]<=[2,4]T(1,0)
        [int(x) for x in re.findall(r"\d+", field)] for field in re.split(r"<=|T", text + "T")[:3]
    )
    ranks = np.arange(math.prod(sizes)).reshape(sizes)
    return ranks.transpose(order or None).reshape(shape)


def _elements(shape: str) -> list[str]:
    """Split a tuple shape at the commas outside inner brackets."""
    elements, depth = [""], 0
    for character in shape.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _size_bytes(shape: str) -> int:
    """Return the bytes of an array shape, or of all arrays in a tuple shape."""
    total = 0
    for array in _ARRAY.finditer(shape):
        bits = int(array["bits"] or 8)  # pred takes a byte
        for dimension in array["dimensions"].split(","):
            bits *= int(dimension.strip("<= ") or 1)
        total += -(-bits // 8)
    return total
