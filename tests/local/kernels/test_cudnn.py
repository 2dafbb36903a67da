"""cuDNN's forward pass in the library's merge and gradient.

cuDNN does not run here. A function of the same contract stands in for it, which gives NaN to rows without a
key, so that all of the library's own code runs.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import distattn
from distattn import _compat
from distattn.local import dispatch
from distattn.local.block import LogitConfig
from distattn.local.inputs import KERNEL_NAMES, make_inputs
from distattn.local.kernels import cudnn
from distattn.local.tiling import Machine
from distattn.testing import compile_for
from tests.cases import Case, check, mesh_of, shardings

attention = functools.partial(distattn.dot_product_attention, return_residual=True)
with_cudnn = functools.partial(attention, implementation="cudnn")

CAUSAL = (("is_causal", True),)
EQUAL = Case(2, 24, 24, kv_heads=1)
CUDNN = {
    "full": Case(2, 10, 24, sinks=True),
    "causal": dataclasses.replace(EQUAL, options=CAUSAL),
    "window": dataclasses.replace(EQUAL, options=(*CAUSAL, ("local_window_size", (5, 3)))),
    "window alone": dataclasses.replace(EQUAL, options=(("local_window_size", (4, 0)),)),
    "lengths": Case(2, 10, 24, lengths=True, query_lengths=True),
    "causal, lengths": dataclasses.replace(EQUAL, lengths=True, options=CAUSAL),
}
# As in test_attention.py: each product of the gradient starts from an output that was rounded once.
HALF_FACTOR = 2.0


def in_place_of_cudnn(query, key, value, *, q_seqlen, kv_seqlen, scale, mask_type, **more):
    """Keep its contract, by jax.nn: out in query's dtype, and the log-sum-exp f32[B, N, T]."""
    assert set(more) == {"sliding_window_length", "return_residual"}
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (jnp.bfloat16, jnp.float16)
    kind = _compat.fused_attention.MaskType
    padded = mask_type in (kind.PADDING, kind.PADDING_CAUSAL)
    assert padded == (q_seqlen is not None) == (kv_seqlen is not None)
    length = more["sliding_window_length"]
    causal = mask_type in (kind.CAUSAL, kind.PADDING_CAUSAL)
    assert causal or length is None
    assert not causal or query.shape[1] == key.shape[1]
    out, lse = jax.nn.dot_product_attention(
        *(x.astype(jnp.float32) for x in (query, key, value)),
        scale=scale,
        is_causal=causal,
        query_seq_lengths=q_seqlen,
        key_value_seq_lengths=kv_seqlen,
        local_window_size=None if length is None else (length - 1, 0),
        return_residual=True,
    )
    empty = lse < -1e30
    out = jnp.where(empty[..., None], jnp.nan, out)
    return out.astype(query.dtype), jnp.where(empty, jnp.nan, lse).swapaxes(1, 2)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """cuDNN takes this machine for a GPU, and the library's own kernels do not."""

    def unsupported(inputs, logit_config, machine, *, backward=False):
        machine = dataclasses.replace(machine, platform="gpu")
        return cudnn.unsupported(inputs, logit_config, machine, backward=backward)

    there = dataclasses.replace(dispatch.KERNELS["cudnn"], unsupported=unsupported)
    monkeypatch.setitem(dispatch.KERNELS, "cudnn", there)
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    yield
    jax.clear_caches()  # other tests must not find these traces


@pytest.fixture
def stand_in(on_a_gpu, monkeypatch):
    monkeypatch.setattr(_compat.fused_attention, "dot_product_attention", in_place_of_cudnn)


@pytest.mark.parametrize("name", CUDNN)
def test_around_cudnn(stand_in, name):
    check(CUDNN[name], with_cudnn, dtype=jnp.bfloat16, what=f"cudnn {name}", factor=HALF_FACTOR)


def test_around_cudnn_in_float16(stand_in):
    case = CUDNN["causal, lengths"]
    check(case, with_cudnn, dtype=jnp.float16, what="cudnn, float16", factor=HALF_FACTOR)


# ------------------------------------------------------------------------------------------ on a mesh


# Keys that two devices do not divide, of which the last ones are empty, and heads instead of positions.
@pytest.mark.parametrize("strategy", ["butterfly", "ring", "ulysses"])
def test_cudnn_over_a_mesh(stand_in, strategy):
    case = CUDNN["causal"] if strategy == "ulysses" else Case(2, 10, 23, lengths=True)
    case = dataclasses.replace(case, kv_heads=2)
    rows = "auto" if strategy == "butterfly" else "kv"
    where = {**shardings(mesh_of(2, "auto"), "kv", query=rows), "strategy": strategy}
    run = functools.partial(with_cudnn, **where)
    check(case, run, dtype=jnp.bfloat16, what=strategy, factor=HALF_FACTOR)


def inside(*, mesh, check_vma, is_causal=False):
    """Call `sharded_attention` in a shard_map over keys."""
    along = P(None, "kv")
    mapped = jax.shard_map(
        functools.partial(
            distattn.sharded_attention,
            axis_name="kv",
            is_causal=is_causal,
            implementation="cudnn",
        ),
        mesh=mesh,
        in_specs=(P(), along, along),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(mapped)


def arrays(queries=128, keys=128, dtype=jnp.float32, heads=4, kv_heads=2, width=8):
    rng = np.random.default_rng(0)
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    return [jnp.asarray(rng.normal(size=(1, *shape, width)), dtype) for shape in shapes]


@pytest.mark.parametrize("devices", [1, 2])
def test_inside_a_shard_map(stand_in, devices):
    """On an axis of one device positions are known, so causal masks are done."""
    causal = {"is_causal": devices == 1}
    run = functools.partial(inside, mesh=mesh_of(devices, "auto"), **causal)
    query, key, value = arrays(128, 128 * devices, jnp.bfloat16)
    want = distattn.dot_product_attention(query, key, value, implementation="xla", **causal)
    for check_vma in (True, False):
        got = run(check_vma=check_vma)(query, key, value)
        np.testing.assert_allclose(
            got.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=0.02
        )


@pytest.mark.parametrize("check_vma", [True, False])
def test_types_of_cudnn_itself_in_a_shard_map(on_a_gpu, check_vma):
    """Traced with JAX's own call, not with what stands in its place, and not run."""
    run = inside(mesh=mesh_of(2, "auto"), check_vma=check_vma)
    query, key, value = arrays(128, 256, jnp.bfloat16)
    found = jax.eval_shape(
        jax.grad(lambda *x: run(*x).astype(jnp.float32).sum()), query, key, value
    )
    assert (found.shape, found.dtype) == (query.shape, jnp.bfloat16)


# ------------------------------------------------------------------------------------------ the choice


def call_of(dtype=jnp.bfloat16, *, platform, queries=128, keys=128, width=8, **arguments):
    """Return the arguments of `dispatch.chosen_kernel`, from those of a call."""
    logit_config = LogitConfig(
        1.0, arguments.pop("logits_soft_cap", None), arguments.pop("precision", None)
    )
    machine = Machine(platform, arguments.pop("compiler_sharded", False))
    mixed = arguments.pop("value_dtype", dtype)
    value_width = arguments.pop("value_width", width)
    query = jnp.zeros((1, queries, 4, width), dtype)
    key = jnp.zeros((1, keys, 2, width), dtype)
    value = jnp.zeros((1, keys, 2, value_width), mixed)
    usual = dict.fromkeys(
        (
            *("bias", "mask", "query_seq_lengths", "key_value_seq_lengths", "local_window_size"),
            *("query_positions", "key_positions", "query_segment_ids", "key_value_segment_ids"),
        )
    )
    more = usual | {"is_causal": False} | arguments
    return make_inputs(query, key, value, **more), logit_config, machine


IDS = jnp.zeros(128, jnp.int32)
SEGMENTS = {"query_segment_ids": IDS, "key_value_segment_ids": IDS}
LENGTHS = {"key_value_seq_lengths": jnp.array([3])}
REFUSED = {
    "compiler": ({"compiler_sharded": True}, "compiler shards"),
    "bias": ({"bias": jnp.zeros((1, 1, 1, 1))}, "bias is given"),
    "mask": ({"mask": jnp.ones((1, 1, 1, 1), bool)}, "mask is given"),
    "float64": ({"dtype": jnp.float64}, "query has dtype float64"),
    "float32": ({"dtype": jnp.float32}, "query has dtype float32"),
    "dtypes": ({"value_dtype": jnp.float32}, "value has dtype float32"),
    "float16 value": ({"value_dtype": jnp.float16}, "value has dtype float16, and query bfloat16"),
    "key_positions": ({"key_positions": IDS}, "key_positions are given"),
    "query_positions": ({"query_positions": IDS, "is_causal": True}, "query_positions or"),
    "precision": ({"precision": "highest"}, "precision is 'highest'"),
    "platform": ({"platform": "tpu"}, "kernel for GPUs, and the platform is 'tpu'"),
    "soft cap": ({"logits_soft_cap": 2.0}, "logits_soft_cap is 2.0"),
    "segments": (SEGMENTS, "query_segment_ids are given"),
    "right window": ({"local_window_size": (4, 2)}, r"local_window_size is \(4, 2\)"),
    "window, lengths": (LENGTHS | {"local_window_size": (4, 0)}, "one of the two"),
    "causal, T and S": ({"is_causal": True, "queries": 4}, "is_causal is given for T=4"),
    "head dimension": ({"width": 12}, "head dimension of 12; supported are multiples of 8"),
    "wide": ({"width": 256}, "head dimension of 256; supported are multiples of 8 up to 128"),
    "values": ({"value_width": 16}, "value has a head dimension of 16"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_which_argument(monkeypatch, what):
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    overrides, words = REFUSED[what]
    with jax.enable_x64(what == "float64"):
        call = call_of(**({"platform": "gpu"} | overrides))
    with pytest.raises(NotImplementedError, match=f"implementation='cudnn'.*{words}"):
        dispatch.chosen_kernel(*call, "cudnn")


def test_causal_over_sharded_keys_says_what_to_shard_instead(stand_in):
    where = {**shardings(mesh_of(2, "auto"), "kv", query=None)}
    with pytest.raises(NotImplementedError, match="is_causal.*key_value_sharding"):
        with_cudnn(*arrays(256, 256, jnp.bfloat16), is_causal=True, **where)


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [(None, (9, 0), "no cuDNN"), (91000, (7, 5), r"capability \(7, 5\)"), (91000, (9, 0), None)],
)
def test_the_library_and_the_gpu(monkeypatch, version, capability, words):
    monkeypatch.setattr(_compat, "cudnn_version", lambda: version)
    monkeypatch.setattr(_compat, "compute_capability", lambda: capability)
    reason = cudnn.unsupported(*call_of(platform="gpu", width=128 if words else 256))
    assert bool(reason) == bool(words)
    assert words is None or re.search(words, reason)


def test_none_takes_what_keeps_nan_where_it_is(monkeypatch):
    """On one device; with eight, no call outside a shard_map is known to be alone."""
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(dispatch, "_is_alone", lambda: True)
    kernels = dispatch.KERNELS
    for more in ({}, LENGTHS):
        assert dispatch.chosen_kernel(*call_of(platform="gpu", **more), "auto") is kernels["cudnn"]
    for more in ({"is_causal": True}, {"key_positions": IDS}, {"dtype": jnp.float32}):
        call = call_of(platform="gpu", **more)
        assert dispatch.chosen_kernel(*call, "auto") is kernels["pallas_gpu"]
    causal = call_of(platform="gpu", is_causal=True)
    assert dispatch.chosen_kernel(*causal, "cudnn") is kernels["cudnn"]
    assert dispatch.chosen_kernel(*call_of(platform="tpu"), "auto") is kernels["pallas_tpu"]


def test_its_gradient_is_that_of_another_kernel(monkeypatch):
    """It is `pallas_gpu`'s if that supports the call, else that of XLA's operations."""
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn.pallas_gpu, "unsupported", lambda *_, **__: None)
    ran = []
    for module, name in ((cudnn.pallas_gpu, "pallas_gpu"), (cudnn.blockwise, "xla")):
        monkeypatch.setattr(module, "fold_gradients", lambda *_, name=name, **__: ran.append(name))
    call = call_of(platform="gpu")
    assert dispatch.chosen_kernel(*call, "cudnn", backward=True) is dispatch.KERNELS["cudnn"]
    cudnn.fold_gradients(*call, None)
    monkeypatch.setattr(cudnn.pallas_gpu, "unsupported", lambda *_, **__: "no")
    cudnn.fold_gradients(*call, None)
    assert ran == ["pallas_gpu", "xla"]


def test_all_kernels_have_a_name():
    assert sorted(dispatch.KERNELS) == sorted(KERNEL_NAMES)


# ------------------------------------------------------------------------------------ empty is a value


def test_empty_slots_may_hold_anything(stand_in):
    """A row of the batch without a single key, and one with some; all others slots are NaN."""
    query, key, value = (jnp.concatenate([x, x]) for x in arrays(8, 128, jnp.bfloat16))
    lengths = jnp.array([0, 5])
    dirty = [x.at[0].set(jnp.nan).at[1, 5:].set(jnp.nan) for x in (key, value)]

    def loss(query, key, value):
        out, lse = with_cudnn(query, key, value, key_value_seq_lengths=lengths)
        return out.astype(jnp.float32).sum(), (out, lse)

    run = jax.grad(loss, (0, 1, 2), has_aux=True)
    got = run(query, *dirty)
    clean = run(query, key, value)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.float32), y.astype(jnp.float32))
    gradients, (out, lse) = got
    assert not out[0].any()
    assert (lse[0] == -jnp.inf).all()
    assert jnp.isfinite(lse[1]).all()
    assert not any(x[0].any() for x in gradients)


def test_rows_without_a_key_are_told_from_the_mask():
    for window, lengths in (((3, 2), [9]), ((0, 0), [4]), ((None, 1), [0]), ((2, None), [20])):
        operands, *_ = call_of(
            platform="cpu",
            queries=30,
            keys=20,
            local_window_size=window,
            key_value_seq_lengths=jnp.array(lengths),
            query_seq_lengths=jnp.array([25]),
        )
        mask = operands.mask
        want = mask.allowed(1).any(axis=-1)[:, 0, 0]
        np.testing.assert_array_equal(cudnn.rows_with_keys(mask, 30, 20), want)


# -------------------------------------------------------------------------------------------- compiled


def compiled(topology, *, gradient=False, **options):
    """Compiled for accelerators that are not here, with heads over devices, so that causal is done."""
    run = functools.partial(
        distattn.dot_product_attention,
        key_value_sharding=P(None, None, "kv"),
        implementation="cudnn",
        **options,
    )

    def gradients(*x):
        return jax.grad(lambda *y: run(*y).astype(jnp.float32).sum(), (0, 1, 2))(*x)

    struct = jax.ShapeDtypeStruct
    along = P(None, None, "kv")
    sizes = ((1, 1024, 16, 128), (1, 1024, 8, 128), (1, 1024, 8, 128))
    return compile_for(
        gradients if gradient else run,
        *(struct(size, jnp.bfloat16) for size in sizes),
        topology=topology,
        mesh={"kv": 4},
        specs=(along,) * 3,
    )


def test_cudnn_is_called_in_what_is_compiled_for_a_gpu(monkeypatch):
    """XLA:GPU takes the call; without cuDNN's library and a GPU it does not ask cuDNN for a plan."""
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    for options, kind in (
        ({}, "NO_MASK"),
        ({"is_causal": True}, "CAUSAL"),
        ({"key_value_seq_lengths": np.array([700], np.int32)}, "PADDING"),
    ):
        hlo = compiled("h100:1x4", **options).hlo
        assert hlo.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
        assert re.search(rf'"mask_type": ?"{kind}"', hlo)
    hlo = compiled("h100:1x4", gradient=True).hlo
    assert hlo.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
    assert "SoftmaxBackward" not in hlo
