"""Counts, seconds, bytes and tables as text."""

from collections.abc import Sequence


def count_text(number: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: 3 messages, 1 launch."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def seconds_text(seconds: float) -> str:
    """Return seconds in the unit that suits them: 12.5 us."""
    return _scaled(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))


def bytes_text(count: float) -> str:
    """Return bytes in the unit that suits them: 3.25 MiB."""
    units = ("TiB", "GiB", "MiB", "KiB", "B")
    sizes = (2.0**40, 2.0**30, 2.0**20, 2.0**10, 1.0)
    return _scaled(count, tuple(zip(sizes, units, strict=True)))


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> list[str]:
    """Return the rows as indented lines of columns; those in `numbers` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if k in numbers else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [f"  {line}".rstrip() for line in lines]


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, unit = next((unit for unit in units if value >= unit[0]), units[-1])
    digits = ".0f" if value >= 1000 * size else ".3g"
    return f"{value / size:{digits}} {unit}"
