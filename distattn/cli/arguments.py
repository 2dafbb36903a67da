"""What all commands need to read their arguments."""

import argparse
from collections.abc import Callable


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
