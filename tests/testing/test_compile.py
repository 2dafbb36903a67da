"""Programs compiled for pods by the compilers of TPUs and GPUs, or only lowered."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import distattn
from distattn.cli import main
from distattn.planning.chips import CHIPS
from distattn.planning.cost import Topology, Workload, choose
from distattn.planning.pods import pod
from distattn.testing import compile_for, compilers, lower

HEADS, KV_HEADS, WIDTH = 16, 4, 128
STATE = 4 * HEADS * (WIDTH + 2)  # bytes of the packed state of one query
# topology, axes of the keys
POD_16 = ("v5e:4x4", {"kv": 16})
POD_64 = ("v5p:4x4x4", {"x": 4, "y": 4, "z": 4})
SLICES = ("v5p:2x2x2*2", {"slice": 2, "kv": 8})
TWO_CORES = ("tpu7x:2x2x2", {"kv": 16})
GPUS = ("h100:2x8", {"host": 2, "kv": 8})
PODS = {pod[0]: pod for pod in (POD_16, POD_64, SLICES, TWO_CORES, GPUS)}
# A sequence for each group of devices along dp, heads along tp, keys along sp.
GROUPS = (
    *("--mesh", "dp=4,tp=4,sp=4", "--batch-axis", "dp", "--heads-axis", "tp"),
    *("--batch", "4"),
)


def shapes(rows, keys):
    query = jax.ShapeDtypeStruct((1, rows, HEADS, WIDTH), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, keys, KV_HEADS, WIDTH), jnp.bfloat16)
    return query, key, key


def decode(mesh, strategy, keys=256, how=compile_for, **options):
    """Compile one query over this many keys a device."""
    f = functools.partial(distattn.dot_product_attention, strategy=strategy)
    along = P(None, tuple(mesh))
    arrays = shapes(1, keys * math.prod(mesh.values()))
    return how(f, *arrays, mesh=mesh, specs=(P(), along, along), **options)


def training(mesh, strategy, rows=128, how=compile_for, **options):
    """Compile the gradient of causal attention over this many rows and keys a device."""
    f = functools.partial(distattn.dot_product_attention, strategy=strategy, is_causal=True)
    along, length = P(None, tuple(mesh)), rows * math.prod(mesh.values())
    gradient = jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return how(gradient, *shapes(length, length), mesh=mesh, specs=(along,) * 3, **options)


@pytest.mark.parametrize("name", PODS)
def test_a_butterfly_has_log_rounds_of_one_state_along_each_axis(name):
    topology, mesh = PODS[name]
    report = decode(mesh, "butterfly", topology=topology)
    rounds = sum(math.ceil(math.log2(size)) for size in mesh.values())
    assert report.target == topology
    assert report.devices == math.prod(mesh.values())
    assert report.rounds == rounds
    # Between slices a permute is a send, a recv.
    sent = [x for x in report.exchanges if x.kind != "recv"]
    assert {x.kind for x in sent} == {"collective-permute", "send"} - (
        {"send"} if name != SLICES[0] else set()
    )
    for x in sent:
        (axis,) = x.axes
        assert x.count == math.ceil(math.log2(mesh[axis]))
        assert x.bytes == x.count * STATE
    assert sum(x.count for x in sent) == rounds


@pytest.mark.parametrize("strategy", ["butterfly", "psum", "all_gather"])
def test_what_a_decoding_step_sends_and_holds_depends_on_no_length(strategy):
    topology, mesh = POD_16
    short, long = (decode(mesh, strategy, keys, topology=topology) for keys in (1024, 8192))
    assert short.exchanges == long.exchanges
    assert max(short.temp_bytes, long.temp_bytes) < 2**19  # the keys are 16 times that
    kind, count, size = {
        "butterfly": ("collective-permute", 4, 4 * STATE),
        "psum": ("all-reduce", 2, STATE),
        "all_gather": ("all-gather", 1, 16 * STATE),
    }[strategy]
    assert long.collectives == {kind: {"count": count, "bytes": size}}
    assert long.argument_bytes >= 8192 * KV_HEADS * 2 * WIDTH * 2
    assert long.flops > 0
    assert long.accessed_bytes > 0
    assert long.optimal_s is None or 0 < long.optimal_s < 1


# Counts in the compiled program; XLA:TPU makes a reduce-scatter a part of an all-reduce.
@pytest.mark.parametrize(
    ("pod", "strategy", "counts", "rounds"),
    [
        (POD_16, "ring", {"collective-permute": 8 * 15}, 32),
        (POD_16, "gather_kv", {"all-gather": 2, "all-reduce": 1}, 2),
        (POD_16, "ulysses", {"all-to-all": 7}, 4),
        (POD_64, "ring", {"collective-permute": 8 * 63}, 128),
        (GPUS, "ring", None, None),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0] if isinstance(x, tuple) else "",
)
def test_training(pod, strategy, counts, rounds):
    topology, mesh = pod
    report = training(mesh, strategy, topology=topology)
    assert counts is None or {k: v["count"] for k, v in report.collectives.items()} == counts
    assert rounds is None or report.rounds == rounds
    if strategy == "ring":
        assert set(report.collectives) == {"collective-permute"}, "keys and values are not gathered"


def test_gradients_of_half_precision_are_summed_in_float32():
    """XLA:TPU rounds in the all-reduce, whose result is bfloat16: what it adds up is float32."""
    query = jax.ShapeDtypeStruct((1, 128, 8, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)

    def loss(query, key, value):
        out = distattn.dot_product_attention(
            query,
            key,
            value,
            key_value_sharding=P(None, "kv"),
            query_sharding=P(None, None),
            strategy="butterfly",
        )
        return out.astype(jnp.float32).sum()

    keys = P(None, "kv")
    how = {"topology": "v5e:2x4", "mesh": {"kv": 8}, "specs": (P(), keys, keys)}
    text = compile_for(jax.grad(loss), query, key, key, **how).hlo
    summed = re.search(
        r"= bf16\[1,128,8,128\]\S* all-reduce\((%[\w.]+)\).*to_apply=(%[\w.]+)", text
    )
    assert re.search(rf"{re.escape(summed[1])} = f32\[1,128,8,128\]", text)
    assert re.search(
        rf"^{re.escape(summed[2])} \(\S+ f32\[\], \S+ f32\[\]\) -> f32\[\]", text, re.M
    )


@pytest.mark.parametrize("devices", [16, 64, 256, 4096])
def test_counts_by_the_number_of_devices(devices):
    counted = functools.partial(training, {"kv": devices}, rows=64, how=lower)
    ring, scatter = counted("ring"), counted("reduce_scatter")
    assert ring.collectives["collective-permute"]["count"] == 8 * (devices - 1)
    assert scatter.collectives["collective-permute"]["count"] == math.log2(devices)
    for strategy, count in (("butterfly", math.log2(devices)), ("psum", 2), ("all_gather", 1)):
        report = decode({"kv": devices}, strategy, how=lower)
        assert (
            sum(x.count for x in report.exchanges) == report.rounds * (1 if count else 0) == count
        )
        assert report.temp_bytes is None


@pytest.mark.parametrize("topology", ["h100:1x8", "h100:8x1"])
def test_auto_is_chosen_for_the_chips_and_hosts_that_it_is_compiled_for(topology):
    hosts = pod(topology).hosts
    shape = Workload(1, 1, 256 * 8, HEADS, KV_HEADS, WIDTH, WIDTH, 2)
    there = Topology("gpu", (8,), hosts, chip=CHIPS["h100"])
    best = choose(shape, there, query_sharded=False).strategy
    auto, named = (decode({"kv": 8}, x, topology=topology) for x in ("auto", best))
    assert auto.exchanges == named.exchanges


# Rabe & Staats, arXiv 2112.05682, Tables 2 and 3, n = 2^14: MiB beside inputs and outputs.
@pytest.mark.parametrize(
    ("gradient", "standard", "efficient"), [(False, 1024, 17), (True, 2048, 64)]
)
def test_memory_on_one_chip_beside_that_of_the_paper(gradient, standard, efficient):
    array = jax.ShapeDtypeStruct((1, 1 << 14, 1, 64), jnp.bfloat16)

    def temp_mib(f):
        loss = jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        report = compile_for(
            loss if gradient else f, array, array, array, topology="v5p:1x1x1", mesh={"kv": 1}
        )
        return report.temp_bytes / 2**20

    assert temp_mib(distattn.dot_product_attention) < efficient
    with jax.numpy_dtype_promotion("standard"):
        assert efficient < temp_mib(jax.nn.dot_product_attention) <= 1.01 * standard


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_lowered_for_any_mesh_and_platform(platform):
    mesh = AbstractMesh((64, 64), ("host", "chip"), axis_types=(AxisType.Auto,) * 2)
    f = functools.partial(
        distattn.dot_product_attention,
        strategy="butterfly",
        key_value_sharding=P(None, ("host", "chip")),
    )
    along = P(None, ("host", "chip"))
    arrays = shapes(1, 64 * 4096)
    report = lower(f, *arrays, mesh=mesh, platform=platform, specs=(P(), along, along))
    assert report.devices == 4096
    assert {(x.axes, x.count) for x in report.exchanges} == {(("host",), 6), (("chip",), 6)}
    assert report.rounds == 12
    assert report.target == f"{platform}, host=64 x chip=64"


def test_a_whole_training_step_of_a_user():
    def loss(params, tokens):
        x = params["embed"][tokens]
        heads = x.reshape(*x.shape[:2], HEADS, -1)
        q, k, v = (heads @ params[name] for name in "qkv")
        x = distattn.dot_product_attention(
            q, k, v, is_causal=True, key_value_sharding=P(None, "kv"), strategy="ring"
        )
        logits = x.reshape(*x.shape[:2], -1) @ params["out"]
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    @jax.jit
    def step(params, tokens):
        return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params, tokens))

    def float32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {name: float32(8, 8) for name in "qkv"}
    params |= {"embed": float32(64, HEADS * 8), "out": float32(HEADS * 8, 64)}
    tokens = jax.ShapeDtypeStruct((8, 512), jnp.int32)
    auto = AbstractMesh((2, 8), ("data", "kv"), axis_types=(AxisType.Auto,) * 2)
    specs = (P(), P("data", "kv"))
    report = compile_for(step, params, tokens, topology="v5e:4x4", mesh=auto, specs=specs)
    permutes = [x for x in report.exchanges if x.kind == "collective-permute"]
    assert [x.axes for x in permutes] == [("kv",)]
    reduced = [x for x in report.exchanges if x.kind == "all-reduce"]  # gradients of the parameters
    assert any(set(x.axes) == {"data", "kv"} for x in reduced)
    assert report.output_bytes >= sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params))


def test_a_report_is_json():
    topology, mesh = POD_16
    report = decode(mesh, "butterfly", topology=topology)
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert found["collectives"] == {"collective-permute": {"count": 4, "bytes": 4 * STATE}}
    assert found["exchanges"][0]["axes"] == ["kv"]
    assert "hlo" not in found
    assert found["temp_bytes"] == report.temp_bytes
    assert "collective-permute" in report.hlo


def test_layouts_are_those_of_the_arguments():
    mesh = jax.make_mesh((8,), ("kv",), axis_types=(AxisType.Explicit,))
    along = jax.sharding.NamedSharding(mesh, P(None, "kv"))
    query, key, _ = shapes(1, 16 * 64)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=along)
    f = functools.partial(distattn.dot_product_attention, strategy="psum")
    report = lower(f, jnp.zeros(query.shape, query.dtype), key, key, mesh={"kv": 16})
    assert report.collectives["all-reduce"]["count"] == 2
    assert lower(f, query, key, key, mesh=mesh).devices == 8
    with pytest.raises(ValueError, match=r"mesh is kv=8, 8 devices, and topology 'v5e:4x4' has 16"):
        compile_for(f, query, key, key, topology="v5e:4x4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v5q:4x4"}, r"topology is 'v5q:4x4'; .*v5e.*h100"),
        ({"topology": "v5e:3x3"}, r"topology 'v5e:3x3': the TPU compiler does not take it"),
        ({"mesh": {"kv": 8}}, r"mesh is kv=8, 8 devices, and topology 'v5e:4x4' has 16; pass axes"),
        ({"specs": (P(),)}, r"specs has 1 entries and there are 3 arguments"),
    ],
)
def test_what_is_wrong_is_said(change, message):
    how = {"topology": "v5e:4x4", "mesh": {"kv": 16}} | change
    with pytest.raises(ValueError, match=message):
        compile_for(distattn.dot_product_attention, *shapes(1, 4096), **how)


def test_a_compiler_that_is_not_here(monkeypatch):
    f, arrays = distattn.dot_product_attention, shapes(1, 4096)
    with pytest.raises(
        NotImplementedError, match=r"'a100:2x8': there is no compiler here for a100.*lower"
    ):
        compile_for(f, *arrays, topology="a100:2x8")
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    for topology, extra in (("v5e:4x4", "tpu"), ("h100:2x8", "cuda-aot")):
        with pytest.raises(ModuleNotFoundError, match=rf"pip install -e '\.\[{extra}\]'.*lower"):
            compile_for(f, *arrays, topology=topology)


# ------------------------------------------------------------------------ distattn plan --compile

MODEL = ["--heads", "16", "--kv-heads", "4", "--head-dim", "128", "--layers", "80"]


def test_the_command_compiles_what_it_plans(capsys):
    command = ["plan", "--topology", "v5p:4x4x4", "--context", "1000000", *MODEL]
    assert main([*command, "--strategy", "butterfly", "--compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    compiled = found["compiled"]
    assert compiled["collectives"] == {"collective-permute": {"count": 6, "bytes": 6 * STATE}}
    assert compiled["rounds"] == found["rounds"] == 6
    # The program sends the bytes of the plan, and its arguments have the size of the plan's keys.
    assert found["bytes_sent_per_device"] == 80 * 6 * STATE
    assert 80 * compiled["argument_bytes"] == pytest.approx(found["bytes_per_device"], rel=0.02)
    assert {"temp_bytes", "optimal_s"} <= set(compiled)

    assert main([*command, *GROUPS, "--strategy", "butterfly", "--compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Each group has one sequence and a quarter of the heads, and sends along sp alone.
    sent = {"collective-permute": {"count": 2, "bytes": 2 * STATE // 4}}
    assert found["compiled"]["collectives"] == sent
    assert {x for y in found["compiled"]["exchanges"] for x in y["axes"]} == {"sp"}
    assert found["bytes_sent_per_device"] == 80 * 2 * STATE // 4
    held = found["bytes_per_device"]
    assert 80 * found["compiled"]["argument_bytes"] == pytest.approx(held, rel=0.02)

    assert main([*command, "--training", "--queries", "64", "--compile"]) == 0
    text = capsys.readouterr().out
    layer = text.partition("one layer, compiled for ")[2].splitlines()
    assert layer[0] == "v5p:4x4x4: 64 devices, sizes of one"
    assert "not known" not in "".join(line for line in layer if "estimate" not in line)
    assert re.fullmatch(r"  wait for one another +\d+", next(x for x in layer if " wait" in x))
