"""Types of command-line arguments, and the error for wrong ones."""

import argparse
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NoReturn, TypeAlias

# argparse has no public name for the result of `add_subparsers`.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]

# 131072, 131_072, 131,072, 128k, 128Ki, 1.5M
AMOUNT = re.compile(r"(\d{1,3}(?:,\d{3})+|\d[\d_]*(?:\.\d+)?)(?:([kmgt])i?)?", re.IGNORECASE)


class CommandError(Exception):
    """Error that the user can fix: its text is printed, and the exit code is 2."""


def refuse(value: str, wanted: str) -> NoReturn:
    """Raise argparse's error for an argument that is not what it should be."""
    raise argparse.ArgumentTypeError(f"{value!r} is not {wanted}")


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of integers from `least` on."""

    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            refuse(text, f"a whole number of at least {least}")
        return number

    return integer


def amount_at_least(least: int) -> Callable[[str], int]:
    """Return a parser of integers from `least` on, with k, M, G or T for powers of 1024: 128k is 131072."""

    def amount(text: str) -> int:
        match = AMOUNT.fullmatch(text)
        number = Fraction(least) - 1
        if match:
            digits, suffix = re.sub("[,_]", "", match[1]), (match[2] or " ").lower()
            number = Fraction(digits) * 1024 ** " kmgt".index(suffix)
        if number < least or number.denominator > 1:
            refuse(
                text,
                f"a whole number of at least {least}; with k, M, G or T it is multiplied by "
                "1024, 1024^2 and so on, as in 128k (131072) or 1.5M",
            )
        return int(number)

    return amount


def seconds(text: str) -> float:
    """Parse a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        refuse(text, "a number of seconds above 0")
    return value


def axis_names(text: str) -> tuple[str, ...]:
    """Parse names of mesh axes, as data,fsdp."""
    names = tuple(text.split(","))
    if not all(name.isidentifier() for name in names):
        refuse(text, "names of mesh axes, as data or data,fsdp")
    return names


def some_of(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of some of the names, with commas between them."""

    def chosen(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        if not set(found) <= set(names):
            refuse(text, f"some of {', '.join(names)}, with commas between them")
        return found

    return chosen


def mesh_axes(text: str) -> dict[str, int]:
    """Parse sizes of mesh axes by name, as host=2,device=4."""
    axes: dict[str, int] = {}
    for axis in text.split(","):
        name, _, size = axis.partition("=")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            refuse(text, "axes with their sizes, each axis once, as host=2,device=4")
        axes[name] = int(size)
    return axes
