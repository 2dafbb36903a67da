"""Differences between the supported JAX versions, private parts of JAX, and optional packages."""

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

# Process count of the target job when compiling ahead of time for another cluster.
traced_processes: ContextVar[int | None] = ContextVar("traced_processes", default=None)


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Return the axes over which any array is typed as varying (empty outside `check_vma=True`)."""
    return frozenset().union(*(_varying(jax.typeof(x)) for x in arrays))


def concrete(x: Any) -> Any:
    """Return the array behind x, also inside `jax.grad` outside jit; None if it has no value yet."""
    return x.to_concrete_value() if isinstance(x, Tracer) else x


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Return x typed as varying over `axes` too.

    Loop carries, `cond` branches and the inputs of a `custom_vjp` inside `shard_map` must agree in
    this type. The transpose of the cast is the sum over devices that a replicated operand needs.
    """
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def all_gather_as_replicated(x: jax.Array, axes: tuple[str, ...], size: int) -> jax.Array:
    """Stack x of all devices to [D, ...], typed as replicated (under `check_vma=True`)."""
    try:
        return lax.all_gather(x, axes, to="invarying")
    except ValueError:  # JAX before 0.10 lacks this type: sum stacks that are zero but for one x
        rank = lax.axis_index(axes)
        stack = vary(jnp.zeros((size, *x.shape), x.dtype), varying_axes(x, rank))
        return lax.psum(lax.dynamic_update_index_in_dim(stack, x, rank, 0), axes)


def platform_of(mesh: Any = None) -> str:
    """Return 'cpu', 'gpu' or 'tpu', of a mesh or of the devices that are traced for.

    An abstract mesh may name its devices; otherwise they are the default ones.
    """
    device = _device(mesh)
    if device is None:
        return jax.default_backend()
    if hasattr(device, "platform"):
        return device.platform
    kind = device.device_kind.lower()  # JAX before 0.10
    return next((x for x in ("cpu", "tpu") if kind.startswith(x)), "gpu")


def device_kind_of(mesh: Any = None) -> str:
    """Return JAX's name for the devices of `platform_of`, as 'TPU v5 lite'."""
    device = _device(mesh)
    return (jax.local_devices()[0] if device is None else device).device_kind


def _device(mesh: Any) -> Any:
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0]
    return (jax.sharding.get_abstract_mesh() if mesh is None else mesh).abstract_device


def processes_of(mesh: Any = None) -> int:
    """Return the number of processes that a mesh spans, or of the job."""
    if isinstance(mesh, Mesh):
        return len({device.process_index for device in mesh.devices.flat})
    return traced_processes.get() or jax.process_count()


def shaped(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """Return the `out_shape` of a `pallas_call` whose result varies over the axes."""
    like = jax.typeof(vary(jnp.zeros(()), axes))
    if hasattr(like, "vma"):  # JAX before 0.10
        more: dict[str, Any] = {"vma": like.vma}
        return jax.ShapeDtypeStruct(shape, dtype, **more)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=like.manual_axis_type)


def abstract_device(platform: str) -> AbstractDevice:
    """Return a device of a platform, for an abstract mesh."""
    # JAX from 0.12 on asks for the kind of a GPU: the typical one, as in `distattn.planning.chips`.
    kind = "NVIDIA H100 80GB HBM3" if platform == "gpu" else platform
    fields = {"device_kind": kind, "num_cores": None, "platform": platform}
    names = AbstractDevice.__dataclass_fields__  # platform is among them from JAX 0.10 on
    return AbstractDevice(**{name: x for name, x in fields.items() if name in names})


def _varying(kind: Any) -> frozenset[str]:
    if hasattr(kind, "vma"):  # JAX before 0.10
        return kind.vma
    return kind.manual_axis_type.varying


def coordination() -> tuple[Any, int, int]:
    """Return the client of JAX's coordination service, the rank, and the number of processes.

    The client is None for a process alone. No version has a public name for it; Orbax reaches it in
    the same way. distattn calls `key_value_set`, `key_value_try_get`, `key_value_dir_get`,
    `key_value_delete` and `wait_at_barrier`. Rank and size equal `jax.process_index()` and
    `jax.process_count()`, but do not start JAX.
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
    """Compute attention by cuDNN: out [B, T, N, V] in query's dtype, log-sum-exp f32[B, N, T].

    `jax.nn.dot_product_attention`, the public function, rounds the log-sum-exp to the query's dtype.

    Args:
      query: [B, T, N, H], bfloat16 or float16.
      key: [B, S, K, H].
      value: [B, S, K, H].
      scale: factor of query . key.
      is_causal: whether row t attends to keys 0 .. t only.
      left: largest number of keys before t that row t attends to, under is_causal; None: all.
      key_lengths: int32[B], number of leading keys that count; None: all.
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
    """Return the version of cuDNN, 91002 for 9.10.2; None if JAX finds no cuDNN."""
    try:
        return fused_attention.check_cudnn_version()
    except RuntimeError:
        return None


def compute_capability() -> tuple[int, ...] | None:
    """Return the compute capability of this process's GPUs, (9, 0) for an H100; None without."""
    device = jax.local_devices()[0]
    parts = str(getattr(device, "compute_capability", None)).split(".")  # AMD: gfx942
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else None


def command(extra: str) -> str:
    """Return the command that installs an extra, from a clone because distattn is not released."""
    return f"pip install -e '.[{extra}]' in a clone of distattn"


@contextlib.contextmanager
def needed(package: str, *, by: str, extra: str) -> Generator[None, None, None]:
    """Explain a failed import: the error names the user of the package and the command to install it.

    Args:
      package: top-level name of the package.
      by: what needs the package.
      extra: extra of distattn that brings it.

    Raises:
      ModuleNotFoundError: the package is not installed. An error about another package is unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"{by} needs {package}, which is not installed: {command(extra)}", name=error.name
        ) from error


# Part of the key of JAX's tracing cache.
_interpret = jax.make_user_context(None)


@contextlib.contextmanager
def interpreted(params: Any = True) -> Generator[None, None, None]:
    """Run the kernels traced meanwhile on a CPU, by Pallas' interpreter.

    Args:
      params: `interpret` of `pallas_call`: True, or, for TPU kernels, a `pltpu.InterpretParams`, which
        simulates a TPU's memories. With kernels on several fake devices it needs PJRT_NPROC=16 in the
        environment before JAX starts.
    """
    with _interpret(params):
        yield


def interpreter() -> Any:
    """Return the argument of `interpreted`, for `pallas_call`; None outside it."""
    return _interpret.value
