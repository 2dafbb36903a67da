"""Counts, seconds and bytes as text."""


def count_text(number: int, one: str, many: str | None = None) -> str:
    """3 messages, 1 launch."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def seconds_text(seconds: float) -> str:
    """12.5 us."""
    return _scaled(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")))


def bytes_text(count: float) -> str:
    """3.25 MiB."""
    units = ("TiB", "GiB", "MiB", "KiB", "B")
    sizes = (2.0**40, 2.0**30, 2.0**20, 2.0**10, 1.0)
    return _scaled(count, tuple(zip(sizes, units, strict=True)))


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, unit = next((unit for unit in units if value >= unit[0]), units[-1])
    digits = ".0f" if value >= 1000 * size else ".3g"
    return f"{value / size:{digits}} {unit}"
