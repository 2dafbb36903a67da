"""Functions that are imported when they are called: not all versions of JAX bring all that Pallas needs."""

import importlib
from collections.abc import Callable
from typing import Any


def late(module: str, name: str) -> Callable[..., Any]:
    """The function of that name, of a module of this package, which may be one that cannot be imported."""
    path = f"distattn.kernels.{module}"
    return lambda *arguments, **options: getattr(importlib.import_module(path), name)(
        *arguments, **options
    )
