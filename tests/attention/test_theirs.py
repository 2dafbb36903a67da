"""The kernels of others, cuDNN's and JAX's splash attention, in our merge and our `custom_vjp`.

Splash attention runs in Pallas' interpreter. cuDNN does not run here at all: in its place stands a function
of the same contract, which gives NaN to rows without a key, so that all that is ours is run.
"""

import contextlib
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
from distattn.local.inputs import make_inputs
from distattn.local.kernels import cudnn, splash
from distattn.local.kernels.tpu import support
from distattn.local.tiling import Machine
from distattn.testing import compile_for, interpreted
from tests.cases import Case, check, mesh_of, shardings
from tests.tolerance import assert_close

attention = functools.partial(distattn.dot_product_attention, return_residual=True)
with_splash = functools.partial(attention, implementation="splash")
with_cudnn = functools.partial(attention, implementation="cudnn")

# Splash attention is made for blocks of 128 keys and more.
SMALL = Case(1, 24, 256, width=16, value_width=16)
CAUSAL = (("is_causal", True),)
SPLASH = {
    "full, other widths": dataclasses.replace(SMALL, value_width=24, sinks=True),
    "causal, fewer queries": dataclasses.replace(SMALL, options=(*CAUSAL, ("scale", 0.3))),
    "causal, more queries": dataclasses.replace(SMALL, queries=384, keys=128, options=CAUSAL),
    "window to both sides": dataclasses.replace(SMALL, options=(("local_window_size", (5, 130)),)),
    "window past the keys": Case(1, 384, 128, options=(("local_window_size", (3, 2)),)),
    "segments": Case(2, 24, 256, segments=12, options=CAUSAL),
    "lengths": Case(2, 24, 256, lengths=True, query_lengths=True, options=CAUSAL),
    "soft cap": dataclasses.replace(SMALL, kv_heads=1, options=(("logits_soft_cap", 1.5),)),
}
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


# ----------------------------------------------------------------------------------------------- cuDNN


def in_place_of_cudnn(query, key, value, *, q_seqlen, kv_seqlen, scale, mask_type, **more):
    """Its contract, by jax.nn: out in query's dtype, and the log-sum-exp f32[B, N, T]."""
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
    """cuDNN takes this machine for a GPU, and our own kernels do not."""
    refusal = cudnn.refusal

    def there(operands, logit_config, machine, *, backward=False):
        machine = dataclasses.replace(machine, platform="gpu")
        return refusal(operands, logit_config, machine, backward=backward)

    monkeypatch.setattr(cudnn, "refusal", there)
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    yield
    jax.clear_caches()  # what was traced so is not to be found elsewhere


@pytest.fixture
def stand_in(on_a_gpu, monkeypatch):
    monkeypatch.setattr(_compat.fused_attention, "dot_product_attention", in_place_of_cudnn)


@pytest.mark.parametrize("name", CUDNN)
def test_around_cudnn(stand_in, name):
    check(CUDNN[name], with_cudnn, dtype=jnp.bfloat16, what=f"cudnn {name}", factor=HALF_FACTOR)


def test_around_cudnn_in_float16(stand_in):
    case = CUDNN["causal, lengths"]
    check(case, with_cudnn, dtype=jnp.float16, what="cudnn, float16", factor=HALF_FACTOR)


# ------------------------------------------------------------------------------------ splash attention


@pytest.mark.parametrize("name", SPLASH)
def test_splash(name):
    with interpreted():
        check(SPLASH[name], with_splash, what=f"splash {name}")


def test_splash_in_bfloat16():
    """A scale of 1 / 4 rounds nothing."""
    case = dataclasses.replace(SPLASH["causal, fewer queries"], options=CAUSAL)
    with interpreted():
        check(case, with_splash, dtype=jnp.bfloat16, what="splash", factor=HALF_FACTOR)


def test_splash_rounds_a_bfloat16_query_that_it_scales():
    query, key, value = arrays(16, 256, jnp.bfloat16)
    call = {"scale": 0.3, "return_residual": True}
    want = distattn.dot_product_attention(query, key, value, **call, implementation="xla")
    with interpreted():
        got = distattn.dot_product_attention(query, key, value, **call, implementation="splash")
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, jnp.bfloat16, 256, HALF_FACTOR, what="splash, rounded")


PAST_THE_KEYS = SPLASH["window past the keys"]


@pytest.mark.parametrize("case", [SPLASH["causal, more queries"], PAST_THE_KEYS])
def test_splash_in_several_blocks(case):
    """Of the second, no block of keys is for the last rows."""

    def in_blocks(**arguments):
        state = distattn.partial_attention(
            **arguments, implementation="splash", block_sizes=(128, 100)
        )
        return distattn.finalize(state)

    with interpreted():
        check(case, in_blocks, what="splash in blocks")


# ------------------------------------------------------------------------------------- both, on a mesh


@contextlib.contextmanager
def nothing():
    yield


def over_devices(strategy, case, run, dtype, around, factor):
    rows = "auto" if strategy == "butterfly" else "kv"
    where = {**shardings(mesh_of(2, "auto"), "kv", query=rows), "strategy": strategy}
    with around():
        check(case, functools.partial(run, **where), dtype=dtype, what=f"{strategy}", factor=factor)


# Keys that two devices do not divide, of which the last ones are empty, and heads instead of positions.
@pytest.mark.parametrize("strategy", ["butterfly", "ring", "ulysses"])
def test_cudnn_over_a_mesh(stand_in, strategy):
    case = CUDNN["causal"] if strategy == "ulysses" else Case(2, 10, 23, lengths=True)
    case = dataclasses.replace(case, kv_heads=2)
    over_devices(strategy, case, with_cudnn, jnp.bfloat16, nothing, HALF_FACTOR)


@pytest.mark.parametrize("strategy", ["butterfly", "ring", "ulysses"])
def test_splash_over_a_mesh(strategy):
    case = Case(1, 24, 255 if strategy == "butterfly" else 256)
    if strategy == "ulysses":
        case = dataclasses.replace(case, options=CAUSAL)
    over_devices(strategy, case, with_splash, jnp.float32, interpreted, 1.0)


def inside(*, mesh, implementation, check_vma, is_causal=False):
    """The call in a shard_map of one's own, over keys."""
    along = P(None, "kv")
    mapped = jax.shard_map(
        functools.partial(
            distattn.sharded_attention,
            axis_name="kv",
            is_causal=is_causal,
            implementation=implementation,
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
    for name, check_vma in (("cudnn", True), ("cudnn", False), ("splash", False)):
        with interpreted():
            got = run(implementation=name, check_vma=check_vma)(query, key, value)
        np.testing.assert_allclose(
            got.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=0.02
        )


@pytest.mark.parametrize("check_vma", [True, False])
def test_types_of_cudnn_itself_in_a_shard_map(on_a_gpu, check_vma):
    """Traced with JAX's own call, not with what stands in its place, and not run."""
    run = inside(mesh=mesh_of(2, "auto"), implementation="cudnn", check_vma=check_vma)
    query, key, value = arrays(128, 256, jnp.bfloat16)
    found = jax.eval_shape(
        jax.grad(lambda *x: run(*x).astype(jnp.float32).sum()), query, key, value
    )
    assert (found.shape, found.dtype) == (query.shape, jnp.bfloat16)


def test_splash_has_no_types_for_a_checked_shard_map():
    run = inside(mesh=mesh_of(2, "auto"), implementation="splash", check_vma=True)
    with (
        interpreted(),
        pytest.raises(NotImplementedError, match="check_vma=True.*pass False"),
    ):
        run(*arrays(keys=256))


# ------------------------------------------------------------------------------------------ the choice


def call_of(dtype=jnp.bfloat16, *, platform, queries=128, keys=128, width=8, **arguments):
    """The arguments of `kernels.chosen`, from those of a call."""
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
BOTH = {
    "compiler": ({"compiler_sharded": True}, "compiler shards"),
    "bias": ({"bias": jnp.zeros((1, 1, 1, 1))}, "bias is given"),
    "mask": ({"mask": jnp.ones((1, 1, 1, 1), bool)}, "mask is given"),
    "dtype": ({"dtype": jnp.float64}, "query has dtype"),
    "dtypes": ({"value_dtype": jnp.float32}, "value has dtype float32"),
    "key_positions": ({"key_positions": IDS}, "key_positions are given"),
    "query_positions": ({"query_positions": IDS, "is_causal": True}, "query_positions or"),
    "precision": ({"precision": "highest"}, "precision is 'highest'"),
}
REFUSED = {
    "cudnn": BOTH
    | {
        "platform": ({"platform": "tpu"}, "kernel for GPUs, and the platform is 'tpu'"),
        "dtype": ({"dtype": jnp.float32}, "query has dtype float32"),
        "soft cap": ({"logits_soft_cap": 2.0}, "logits_soft_cap is 2.0"),
        "segments": (SEGMENTS, "query_segment_ids are given"),
        "right window": ({"local_window_size": (4, 2)}, r"local_window_size is \(4, 2\)"),
        "window, lengths": (LENGTHS | {"local_window_size": (4, 0)}, "one of the two"),
        "causal, T and S": ({"is_causal": True, "queries": 4}, "is_causal is given for T=4"),
        "head dimension": ({"width": 12}, "head dimension of 12; done are multiples of 8"),
        "wide": ({"width": 256}, "head dimension of 256; done are multiples of 8 up to 128"),
        "values": ({"value_width": 16}, "value has a head dimension of 16"),
    },
    "splash": BOTH
    | {
        "platform": ({"platform": "gpu"}, "kernel for TPUs, and the platform is 'gpu'"),
        "dtype": ({"dtype": jnp.float16}, "query has dtype float16"),
        "segments, lengths": (SEGMENTS | LENGTHS, "query_segment_ids.*one of the two"),
        "queries": ({"queries": 700}, "query has T=700"),
        "keys": ({"keys": 100}, "key has S=100"),
    },
}


@pytest.mark.parametrize(("name", "what"), [(x, y) for x in REFUSED for y in REFUSED[x]])
def test_what_is_refused_says_which_argument(monkeypatch, name, what):
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    overrides, words = REFUSED[name][what]
    own = {"cudnn": "gpu", "splash": "tpu"}[name]
    with jax.enable_x64(what == "dtype"):
        call = call_of(**({"platform": own} | overrides))
    with pytest.raises(NotImplementedError, match=f"implementation='{name}'.*{words}"):
        dispatch.chosen(*call, name)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_causal_over_sharded_keys_says_what_to_shard_instead(stand_in, name):
    where = {**shardings(mesh_of(2, "auto"), "kv", query=None)}
    call = {"is_causal": True, "implementation": name, **where}
    with (
        interpreted(),
        pytest.raises(NotImplementedError, match="is_causal.*key_value_sharding"),
    ):
        distattn.dot_product_attention(*arrays(256, 256, jnp.bfloat16), **call)


@pytest.mark.parametrize(
    ("version", "capability", "words"),
    [(None, (9, 0), "no cuDNN"), (91000, (7, 5), r"capability \(7, 5\)"), (91000, (9, 0), None)],
)
def test_the_library_and_the_gpu(monkeypatch, version, capability, words):
    monkeypatch.setattr(_compat, "cudnn_version", lambda: version)
    monkeypatch.setattr(_compat, "compute_capability", lambda: capability)
    reason = cudnn.refusal(*call_of(platform="gpu", width=128 if words else 256))
    assert bool(reason) == bool(words)
    assert words is None or re.search(words, reason)


def test_none_takes_what_keeps_nan_where_it_is(monkeypatch):
    """On one device; with eight, no call outside a shard_map is known to be alone."""
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(dispatch, "_is_alone", lambda: True)
    for more in ({}, LENGTHS):
        assert dispatch.chosen(*call_of(platform="gpu", **more), "auto") is cudnn
    for more in ({"is_causal": True}, {"key_positions": IDS}, {"dtype": jnp.float32}):
        assert dispatch.chosen(*call_of(platform="gpu", **more), "auto") is not cudnn
    assert dispatch.chosen(*call_of(platform="gpu", is_causal=True), "cudnn") is cudnn
    assert dispatch.chosen(*call_of(platform="tpu"), "auto") is support


def test_whose_gradient(monkeypatch):
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    call = call_of(platform="tpu")
    assert dispatch.chosen(*call, "splash") is splash
    assert dispatch.chosen(*call, "splash", backward=True) is support
    found = dispatch.chosen(*call_of(platform="gpu"), "cudnn", backward=True)
    assert found is None or found.__name__.rpartition(".")[2] in cudnn.GRADIENTS_BY
    monkeypatch.setattr(support, "refusal", lambda *_, **__: "no")
    assert dispatch.chosen(*call, "splash", backward=True) is None


# ------------------------------------------------------------------------------------ empty is a value


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_empty_slots_may_hold_anything(stand_in, name):
    """A row of the batch without a single key, and one with some; all others slots are NaN."""
    query, key, value = (jnp.concatenate([x, x]) for x in arrays(8, 128, jnp.bfloat16))
    lengths = jnp.array([0, 5])
    dirty = [x.at[0].set(jnp.nan).at[1, 5:].set(jnp.nan) for x in (key, value)]

    def loss(query, key, value):
        out, lse = attention(query, key, value, key_value_seq_lengths=lengths, implementation=name)
        return out.astype(jnp.float32).sum(), (out, lse)

    run = jax.grad(loss, (0, 1, 2), has_aux=True)
    with interpreted():
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
        np.testing.assert_array_equal(dispatch.finished.rows_with_keys(mask, 30, 20), want)


# -------------------------------------------------------------------------------------------- compiled


def compiled(name, topology, *, gradient=False, **options):
    """Compiled for accelerators that are not here, with heads over devices, so that causal is done."""
    run = functools.partial(
        distattn.dot_product_attention,
        key_value_sharding=P(None, None, "kv"),
        implementation=name,
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


@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_splash_compiles(target):
    hlo = compiled("splash", target, is_causal=True).hlo
    assert hlo.count('custom_call_target="tpu_custom_call"') == 1
    assert "splash" in hlo


def test_the_gradient_of_splash_is_two_kernels_of_ours():
    hlo = compiled("splash", "v5e:2x2", gradient=True).hlo
    assert hlo.count('custom_call_target="tpu_custom_call"') == 3


def test_cudnn_is_called_in_what_is_compiled_for_a_gpu(monkeypatch):
    """XLA:GPU takes the call; without cuDNN's library and a GPU it does not ask cuDNN for a plan."""
    monkeypatch.setattr(_compat.fused_attention, "check_cudnn_version", lambda: 91000)
    for options, kind in (
        ({}, "NO_MASK"),
        ({"is_causal": True}, "CAUSAL"),
        ({"key_value_seq_lengths": np.array([700], np.int32)}, "PADDING"),
    ):
        hlo = compiled("cudnn", "h100:1x4", **options).hlo
        assert hlo.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
        assert re.search(rf'"mask_type": ?"{kind}"', hlo)
    hlo = compiled("cudnn", "h100:1x4", gradient=True).hlo
    assert hlo.count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
    assert "SoftmaxBackward" not in hlo
