"""The command `distattn`: parse, call, print. Each command is a module with a function `add`."""

import argparse
import sys
from collections.abc import Sequence

from distattn.cli import launch, plan
from distattn.cli.arguments import CommandError
from distattn.cli.check import command as check

COMMANDS = (check, plan, launch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
      arguments: arguments without the program name; None reads those of the process.

    Returns:
      Exit code of the command; 2 if the user can fix the error, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="distattn", description="Exact attention over keys and values on many devices."
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except CommandError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
