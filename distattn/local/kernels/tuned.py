"""Block sizes that were measured on the user's chips: a file that `distattn bench kernels --tune` writes.

    {"block_sizes": [{"chip": "v5e", "kind": "decode", "width": 128, "dtype": "bfloat16", "rows": 16,
                      "keys": 1024, "seconds": 0.000213, "jax": "0.10.2", "date": "2026-01-31"}, ...]}

It is of all chips, TPUs and GPUs, and is read while a program is traced: what JAX has traced before keeps
its sizes. All processes of a job need the same file, or they trace different programs.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp

from distattn.planning.chips import chip_of

VARIABLE = "DISTATTN_BLOCK_SIZES"
Kind = Literal["decode", "prefill", "gradient"]
# Rows up to which a call counts as decoding: they are one block, whatever the table says.
DECODE_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Measured:
    """A row of the file: the fastest sizes for such calls on such a chip."""

    chip: str  # as in `distattn.planning.chips`, or what JAX calls it
    kind: Kind
    width: int  # H
    dtype: str  # of keys
    rows: int  # of a block: queries times G
    keys: int  # of a block
    seconds: float  # of one call, the median
    jax: str  # version
    date: str  # ISO 8601

    @property
    def call(self) -> tuple[str, str, int, str]:
        """Of what calls it is: there is one row for each."""
        return self.chip, self.kind, self.width, self.dtype


def tuned(
    chip: str, kind: Kind, width: int, dtype: Any, *, path: str | os.PathLike[str] | None = None
) -> tuple[int, int] | None:
    """Rows and keys of a block, as they were measured; None: they were not.

    Args:
      chip: as `chip_name` gives it.
      kind: as `kind_of` gives it.
      width: H.
      dtype: of keys.
      path: of the file; None: what the environment variable DISTATTN_BLOCK_SIZES says, if it is set.

    Raises:
      ValueError: the file cannot be read, or a field of it; says which and what to do.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        return None
    call = chip, kind, width, jnp.dtype(dtype).name
    return next(((x.rows, x.keys) for x in read(path) if x.call == call), None)


def kind_of(rows: int, *, backward: bool) -> Kind:
    """The kind of a call with T * G rows."""
    if backward:
        return "gradient"
    return "decode" if rows <= DECODE_ROWS else "prefill"


def chip_name(device_kind: str) -> str:
    """The chip by what JAX calls its devices, which is its name where it is in no table."""
    chip = chip_of(device_kind)
    return device_kind if chip is None else chip.name


def read(path: str | os.PathLike[str]) -> tuple[Measured, ...]:
    """All rows of a file, which is read again when it changes.

    Raises:
      ValueError: as `tuned`.
    """
    path = os.path.abspath(path)
    try:
        found = os.stat(path)
        return _read(path, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error


def write(path: str | os.PathLike[str], rows: Iterable[Measured]) -> None:
    """A file of these rows, and of those that are in it already for other calls.

    Raises:
      ValueError: there is a file, and it is not one of block sizes.
      OSError: it cannot be written.
    """
    path = Path(path)
    kept = {x.call: x for x in read(path)} if path.exists() else {}
    kept |= {x.call: x for x in rows}
    content = {"block_sizes": [dataclasses.asdict(kept[call]) for call in sorted(kept)]}
    # Whole or not at all: another process may be reading it.
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@functools.lru_cache(maxsize=8)
def _read(path: str, modified_ns: int, size: int) -> tuple[Measured, ...]:
    del modified_ns, size  # with the path they say which content it is
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(path, f"is not JSON ({error})") from error
    rows = content.get("block_sizes") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise _refused(path, "has no list 'block_sizes'")
    return tuple(_row(path, n, row) for n, row in enumerate(rows))


def _row(path: str, number: int, row: Any) -> Measured:
    if not isinstance(row, dict):
        raise _refused(path, f"has a row {number} in 'block_sizes' that is {row!r}, no object")
    for name, (is_right, what) in _FIELDS.items():
        if name not in row or not is_right(row[name]):
            got = f"is {row[name]!r}" if name in row else "is missing"
            raise _refused(path, f"field {name!r} of row {number} {got}; it must be {what}")
    return Measured(**{name: row[name] for name in _FIELDS})


def _refused(path: str, what: str) -> ValueError:
    return ValueError(
        f"block sizes in {path}: the file {what}. Remove it and write it anew by `distattn bench kernels "
        f"--tune {path}`, or unset {VARIABLE}: then the library has sizes of its own"
    )


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_dtype(x: Any) -> bool:
    try:
        return isinstance(x, str) and jnp.dtype(x).name == x
    except TypeError:
        return False


def _is_seconds(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf


def _is_date(x: Any) -> bool:
    try:
        return bool(datetime.date.fromisoformat(x))
    except (TypeError, ValueError):
        return False


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x)


_COUNT = _is_count, "a whole number of at least 1"
_FIELDS = {
    "chip": (_is_text, "the name of a chip, as 'v5e'"),
    "kind": (lambda x: x in get_args(Kind), f"one of {get_args(Kind)}"),
    "width": _COUNT,
    "dtype": (_is_dtype, "the name of a dtype, as 'bfloat16'"),
    "rows": _COUNT,
    "keys": _COUNT,
    "seconds": (_is_seconds, "a positive number"),
    "jax": (_is_text, "the version of JAX"),
    "date": (_is_date, "a date, as '2026-01-31'"),
}
