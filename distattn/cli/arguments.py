"""What all commands need to read their arguments."""

import argparse
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NoReturn, TypeAlias

# argparse has no public name for what `add_subparsers` gives.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]

# 131072, 131_072, 131,072, 128k, 128Ki, 1.5M
AMOUNT = re.compile(r"(\d{1,3}(?:,\d{3})+|\d[\d_]*(?:\.\d+)?)(?:([kmgt])i?)?", re.IGNORECASE)


class CommandError(Exception):
    """What the user can mend: its text is printed, and the exit code is 2."""


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on: a `type` of argparse."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return whole_number


def amount_at_least(least: int) -> Callable[[str], int]:
    """The same, and with k, M, G or T for powers of 1024, as lengths of contexts are: 128k is 131072."""

    def amount(text: str) -> int:
        found = AMOUNT.fullmatch(text)
        number = Fraction(least) - 1
        if found:
            digits, suffix = re.sub("[,_]", "", found[1]), (found[2] or " ").lower()
            number = Fraction(digits) * 1024 ** " kmgt".index(suffix)
        if number < least or number.denominator > 1:
            refuse(
                text,
                f"a whole number of at least {least}; with k, M, G or T it is so many times 1024, "
                "1024^2 and so on, as 128k (131072) or 1.5M",
            )
        return int(number)

    return amount


def seconds(text: str) -> float:
    """Parse a number of seconds above 0: a `type` of argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        refuse(text, "a number of seconds above 0")
    return value


def axis_names(value: str) -> tuple[str, ...]:
    """Names of mesh axes, of text as data,fsdp: a `type` of argparse."""
    names = tuple(value.split(","))
    if not all(name.isidentifier() for name in names):
        refuse(value, "names of mesh axes, as data or data,fsdp")
    return names


def some_of(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of some of the names, with commas between them: a `type` of argparse."""

    def chosen(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        if not set(found) <= set(names):
            refuse(text, f"some of {', '.join(names)}, with commas between them")
        return found

    return chosen


def mesh_axes(value: str) -> dict[str, int]:
    """Sizes of mesh axes by name, of text as host=2,device=4: a `type` of argparse."""
    axes: dict[str, int] = {}
    for part in value.split(","):
        name, _, size = part.partition("=")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            refuse(value, "axes with their sizes, each axis once, as host=2,device=4")
        axes[name] = int(size)
    return axes


def refuse(value: str, what: str) -> NoReturn:
    """Tells argparse what an argument should have been."""
    raise argparse.ArgumentTypeError(f"{value!r} is not {what}")
