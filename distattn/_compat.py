"""What differs between the JAX versions that are supported, in one place.

What the optional packages are for, and the command that brings them.
"""

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import distributed
from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax.core import Tracer
from jax.sharding import AbstractDevice, Mesh

# Of the job that a program is compiled for, where that is another than the one that compiles it.
traced_processes: ContextVar[int | None] = ContextVar("traced_processes", default=None)


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes over which any of the arrays is typed as varying (empty outside `check_vma=True`)."""
    return frozenset().union(*(_varying(jax.typeof(x)) for x in arrays))


def concrete(x: Any) -> Any:
    """The array, also where it is what `jax.grad` outside jit differentiates; None: it has no value yet."""
    return x.to_concrete_value() if isinstance(x, Tracer) else x


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The same values, typed as varying over `axes` too.

    Loop carries, `cond` branches and the inputs of a `custom_vjp` inside `shard_map` must agree
    in this type; the transpose of the cast is the sum over devices that a replicated operand needs.
    """
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def all_gather_as_replicated(part: jax.Array, axes: tuple[str, ...], size: int) -> jax.Array:
    """[D, ...]: the parts of all devices, typed as equal on all of them (under `check_vma=True`)."""
    try:
        return lax.all_gather(part, axes, to="invarying")
    except ValueError:  # JAX before 0.10 has no such type: a sum in which each part meets zeros
        row = lax.axis_index(axes)
        whole = vary(jnp.zeros((size, *part.shape), part.dtype), varying_axes(part, row))
        return lax.psum(lax.dynamic_update_index_in_dim(whole, part, row, 0), axes)


def platform_of(mesh: Any = None) -> str:
    """'cpu', 'gpu' or 'tpu': of the devices of a mesh, or of the one that is traced for.

    An abstract mesh may say for which devices it stands; where it does not, they are the default ones.
    """
    device = _device(mesh)
    if device is None:
        return jax.default_backend()
    if hasattr(device, "platform"):
        return device.platform
    kind = device.device_kind.lower()  # JAX before 0.10
    return next((x for x in ("cpu", "tpu") if kind.startswith(x)), "gpu")


def device_kind_of(mesh: Any = None) -> str:
    """What JAX calls the devices of `platform_of`, as 'TPU v5 lite'."""
    device = _device(mesh)
    return (jax.local_devices()[0] if device is None else device).device_kind


def _device(mesh: Any) -> Any:
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0]
    return (jax.sharding.get_abstract_mesh() if mesh is None else mesh).abstract_device


def processes_of(mesh: Any = None) -> int:
    """The number of processes that a mesh spans, or that of the job."""
    if isinstance(mesh, Mesh):
        return len({device.process_index for device in mesh.devices.flat})
    return traced_processes.get() or jax.process_count()


def shaped(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """The shape of a result that varies over the axes, as `pallas_call` wants it."""
    like = jax.typeof(vary(jnp.zeros(()), axes))
    if hasattr(like, "vma"):  # JAX before 0.10
        more: dict[str, Any] = {"vma": like.vma}
        return jax.ShapeDtypeStruct(shape, dtype, **more)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=like.manual_axis_type)


def abstract_device(platform: str) -> AbstractDevice:
    """Any device of a platform, for an abstract mesh to stand for."""
    # Of a GPU a kernel asks which (JAX from 0.12 on): the typical one, as in `distattn.planning.chips`.
    kind = "NVIDIA H100 80GB HBM3" if platform == "gpu" else platform
    fields = {"device_kind": kind, "num_cores": None, "platform": platform}
    names = AbstractDevice.__dataclass_fields__  # platform is among them from JAX 0.10 on
    return AbstractDevice(**{name: x for name, x in fields.items() if name in names})


def _varying(kind: Any) -> frozenset[str]:
    if hasattr(kind, "vma"):  # JAX before 0.10
        return kind.vma
    return kind.manual_axis_type.varying


def coordination() -> tuple[Any, int, int]:
    """The client of JAX's coordination service, the rank, and the size of the job; None, 0, 1 where alone.

    No public name leads to the client, on any version: Orbax reaches it in the same way. What is used of it
    are `key_value_set`, `key_value_try_get`, `key_value_dir_get`, `key_value_delete` and `wait_at_barrier`.
    Rank and size are what `jax.process_index` and `jax.process_count` give once the devices are known.
    """
    state = distributed.global_state
    return state.client, state.process_id, state.num_processes


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    is_causal: bool,
    left: int | None,
    key_lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention by cuDNN: out [B, T, N, V] in query's dtype, and the log-sum-exp f32[B, N, T].

    `jax.nn.dot_product_attention`, the public way there, rounds the latter to the dtype of the query.

    Args:
      query: [B, T, N, H], bfloat16 or float16.
      key: [B, S, K, H].
      value: [B, S, K, H].
      scale: of query . key.
      is_causal: row t attends to keys 0 .. t.
      left: how many keys before t it attends to at most, under is_causal; None: all.
      key_lengths: int32[B], of keys from the first on; None: all.
    """
    kind = fused_attention.MaskType
    padded = key_lengths is not None
    causal, whole = (kind.PADDING_CAUSAL, kind.PADDING) if padded else (kind.CAUSAL, kind.NO_MASK)
    rows = jnp.full(query.shape[:1], query.shape[1], jnp.int32) if padded else None
    attention: Any = fused_attention.dot_product_attention
    out, lse = attention(
        query,
        key,
        value,
        q_seqlen=rows,
        kv_seqlen=key_lengths,
        scale=scale,
        mask_type=causal if is_causal else whole,
        sliding_window_length=None if left is None else left + 1,
        return_residual=True,
    )
    return out, lse


def cudnn_version() -> int | None:
    """As 91002 for 9.10.2; None where JAX finds no cuDNN."""
    try:
        return fused_attention.check_cudnn_version()
    except RuntimeError:
        return None


def compute_capability() -> tuple[int, ...] | None:
    """(9, 0) for an H100: of this process's GPUs; None: it has none."""
    device = jax.local_devices()[0]
    parts = str(getattr(device, "compute_capability", None)).split(".")  # of AMD's 'gfx942'
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else None


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


# Part of the key under which JAX caches what it has traced.
_interpret = jax.make_user_context(None)


@contextlib.contextmanager
def interpreted(params: Any = True) -> Generator[None, None, None]:
    """While it is entered, the kernels that are traced run on a CPU, by Pallas' interpreter.

    Args:
      params: of `pallas_call`: True, or, for TPU kernels, a `pltpu.InterpretParams`, which simulates a
        TPU's memories and needs PJRT_NPROC=16 in the environment before JAX starts where several fake
        devices run kernels.
    """
    with _interpret(params):
        yield


def interpreter() -> Any:
    """By which kernels run, as `pallas_call` wants it; None: by none."""
    return _interpret.value
