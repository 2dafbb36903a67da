"""What all commands need to read their arguments."""

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

# argparse has no public name for what `add_subparsers` gives.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]


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
