"""What the optional packages are for, and the command that brings them."""

import contextlib
from collections.abc import Generator


def command(extra: str) -> str:
    """What installs an extra: distattn is not released, so from a clone."""
    return f"pip install -e '.[{extra}]' in a clone of distattn"


@contextlib.contextmanager
def needed(package: str, *, by: str, extra: str) -> Generator[None, None, None]:
    """Around an import: where the package is not installed, the error says who needs it and what brings it.

    Args:
      package: the name under which it is imported, or the first part of it.
      by: what cannot be had without it.
      extra: of distattn, that has it.

    Raises:
      ModuleNotFoundError: the package is not installed. One that the package itself misses is not changed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{by} needs {package}, which is not installed: {command(extra)}", name=error.name
        ) from error
