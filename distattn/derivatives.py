"""What is not differentiated, and says what to do instead: gradients, and what has only these."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import jax

_FORWARD_MODE = (
    "a second derivative, or forward mode, of blocked attention is not built; "
    "pass implementation='dense', which JAX differentiates to any order"
)


@contextlib.contextmanager
def forward_mode_refused() -> Generator[None]:
    """Says what to do instead of forward mode, outside jit; inside, JAX finds it when we have returned."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError(_FORWARD_MODE) from error


def refuse_second_derivative(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, which says what to do instead of being differentiated: it is a gradient already."""
    guarded = jax.custom_jvp(f)

    @guarded.defjvp
    def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> NoReturn:
        raise NotImplementedError(_FORWARD_MODE)

    return guarded
