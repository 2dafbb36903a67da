"""The counts that other tests and the examples rely on, against programs that XLA compiled."""

import subprocess
import sys
import textwrap
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from distattn.testing import (
    Exchange,
    Report,
    collective_bytes,
    collectives,
    compile_for,
    fake_devices,
    lower,
)

DEVICES = 8
RING = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]
WHOLE, SPLIT = PartitionSpec(), PartitionSpec("x")


def compiled(f, out_spec, shape=(16, 24)):
    """Return the optimised HLO of f, which each device runs on its rows of an array."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=SPLIT, out_specs=out_spec, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, np.float32)).compile().as_text()


# Each device has f32[2, 24], 192 bytes.
@pytest.mark.parametrize(
    ("kind", "f", "out_spec", "result_bytes"),
    [
        ("all-reduce", lambda x: lax.psum(x, "x"), WHOLE, 192),
        ("all-gather", lambda x: lax.all_gather(x, "x"), WHOLE, 8 * 192),
        (
            "reduce-scatter",
            lambda x: lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True),
            PartitionSpec(None, "x"),
            24,
        ),
        ("collective-permute", lambda x: lax.ppermute(x, "x", RING), SPLIT, 192),
        (
            "all-to-all",
            lambda x: lax.all_to_all(x, "x", split_axis=1, concat_axis=0, tiled=True),
            SPLIT,
            192,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_of_each_kind(kind, f, out_spec, result_bytes):
    hlo = compiled(f, out_spec)
    assert collectives(hlo) == Counter({kind: 1})
    assert collective_bytes(hlo) == {kind: result_bytes}


def test_results_in_a_tuple_count_once_and_all_their_bytes():
    def f(x):
        return lax.psum((x, x[:1], x[0, 0] > 0), "x")

    hlo = compiled(f, WHOLE)
    sizes = collective_bytes(hlo)
    assert set(collectives(hlo)) == set(sizes) == {"all-reduce"}
    assert sizes["all-reduce"] == 192 + 96 + 4  # psum of a bool is an int32


def test_several_kinds_in_one_program():
    def f(x):
        x = lax.ppermute(lax.ppermute(x, "x", RING) * 2, "x", RING)
        return lax.pmax(jnp.sum(x), "x") + lax.all_gather(x, "x")

    assert collectives(compiled(f, WHOLE)) == Counter(
        {"collective-permute": 2, "all-reduce": 1, "all-gather": 1}
    )


def test_the_body_of_a_loop_counts_once_or_as_often_as_it_runs():
    def send(x, _):
        return lax.ppermute(x, "x", RING), None

    def f(x):
        def twice_and_sum(x, _):
            x = lax.scan(send, x, None, length=3)[0]
            return lax.cond(x[0, 0] > lax.psum(x, "x")[0, 0], jnp.sin, jnp.cos, x), None

        return lax.scan(twice_and_sum, lax.ppermute(x, "x", RING), None, length=5)[0]

    hlo = compiled(f, SPLIT)
    assert collectives(hlo) == Counter({"collective-permute": 2, "all-reduce": 1})
    executed = {"collective-permute": 1 + 5 * 3, "all-reduce": 5}
    assert collectives(hlo, executed=True) == executed
    assert collective_bytes(hlo, executed=True)["collective-permute"] == 16 * 192


def test_a_loop_of_unknown_length_counts_once():
    def f(x):
        count = jnp.abs(lax.axis_index("x") * 0 + 3)
        return lax.fori_loop(0, count, lambda _, x: lax.ppermute(x, "x", RING), x)

    assert collectives(compiled(f, SPLIT), executed=True)["collective-permute"] in (1, 3)


def test_names_and_metadata_do_not_count():
    def all_reduce(x):
        with jax.named_scope("all-gather(collective-permute("):
            return jnp.sin(x) * 2

    hlo = compiled(all_reduce, SPLIT)
    assert "all-gather(collective-permute(" in hlo
    assert collectives(hlo) == Counter()
    assert collective_bytes(hlo) == {}


# Forms that the CPU compiler does not write: two halves, layouts with parentheses, send and receive.
ASYNCHRONOUS = """
  %s = (f32[4,130]{1,0:T(4,128)}, f32[4,130]{1,0:T(4,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %d = f32[4,130]{1,0:T(4,128)S(1)} collective-permute-done(%s)
  %g = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(bf16[2,8]{1,0} %y), dimensions={0}
  ROOT %gd = bf16[16,8]{1,0} all-gather-done(%g)
  %r = (f32[3]{0}, /*index=1*/pred[5]{0}) all-reduce-start(%a, %b), to_apply=%add
  %rd = (f32[3]{0}, pred[5]{0}) all-reduce-done(%r)
  %t = ((s32[8]{0}), s32[8]{0}, u32[]) all-to-all-start(%c), dimensions={0}
  %tu = ((s32[8]{0}), s32[8]{0}, u32[]) all-to-all-update(%t)
  %td = s32[8]{0} all-to-all-done(%tu)
  %send.1 = (f32[6]{0}, u32[], token[]) send(%z, %token), channel_id=2
  %send.2 = token[] send-done(%send.1), channel_id=2
  %recv.1 = (f32[7]{0}, u32[], token[]) recv(%token), channel_id=2
  %recv.2 = (f32[7]{0}, token[]) recv-done(%recv.1), channel_id=2
  %fusion.1 = f32[6]{0} fusion(%all-gather.7, f32[6]{0} %all-reduce(1)), calls=%all-to-all(
"""


def test_an_operation_in_two_halves_counts_once():
    kinds = ("collective-permute", "all-gather", "all-reduce", "all-to-all", "send", "recv")
    assert collectives(ASYNCHRONOUS) == Counter(dict.fromkeys(kinds, 1))
    assert collective_bytes(ASYNCHRONOUS) == {
        "collective-permute": 4 * 130 * 4,
        "all-gather": 16 * 8 * 2,
        "all-reduce": 3 * 4 + 5,
        "all-to-all": 8 * 4,
        "send": 6 * 4,
        "recv": 7 * 4,
    }


def test_fake_devices_before_jax_starts():
    program = """
        import jax
        from distattn.testing import fake_devices
        fake_devices(2)
        fake_devices(3)
        assert [device.platform for device in jax.devices()] == ["cpu"] * 3
        fake_devices(3)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


def test_fake_devices_too_late():
    fake_devices(DEVICES)  # JAX runs with these: no effect
    with pytest.raises(RuntimeError, match=r"fake_devices\(3\).*8 cpu device.*before"):
        fake_devices(3)


@pytest.mark.parametrize("count", [0, -8])
def test_fake_devices_of_no_number(count):
    with pytest.raises(ValueError, match=f"count={count} .*positive"):
        fake_devices(count)


def test_a_report_is_printed_with_units():
    exchanges = (
        Exchange("all-reduce", ("host", "kv"), 1, 8192),
        Exchange("collective-permute", (), 12, 3 * 2**20),
    )
    report = Report(
        "v5e:1x1",
        1,
        exchanges,
        rounds=13,
        argument_bytes=2**30,
        output_bytes=512,
        temp_bytes=0,
        flops=1.5e9,
        accessed_bytes=2**31,
        optimal_s=12.5e-6,
        seconds=2.5,
    )
    assert str(report).splitlines() == [
        "v5e:1x1: 1 device, sizes of one",
        "  collectives             1 all-reduce over host, kv, results 8 KiB",
        "                          12 collective-permute over no axis, results 3 MiB",
        "  wait for one another    13",
        "  arguments               1 GiB",
        "  results                 512 B",
        "  temporary               0 B",
        "  flops, loops once       1.5e+09",
        "  accessed, loops once    2 GiB",
        "  estimate, loops once    12.5 us",
        "  made in                 2.5 s",
    ]
    alone = str(Report("cpu, kv=1", 1, (), rounds=0))
    assert "  collectives             none\n" in alone
    assert alone.count("not known") == 6


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"a": 0}, "mesh has 0 devices along 'a'.*at least 1: pass {'a': 8}"),
        ({"a": -1}, "mesh has -1 devices along 'a'.*at least 1: pass {'a': 8}"),
        ({"a": 2.5}, "mesh has 2.5 devices along 'a'.*must be an int.*pass {'a': 8}"),
        ({}, "mesh is {} and has no axis.*{'kv': 1}"),
        (8, "mesh is 8; it must be a jax.sharding.Mesh or AbstractMesh.*jax.make_mesh"),
    ],
)
def test_a_mesh_that_is_none(mesh, message, monkeypatch):
    x = jnp.ones(4)
    with pytest.raises(ValueError, match=message):
        lower(jnp.sum, x, mesh=mesh)
    monkeypatch.setattr("distattn.testing.programs.devices_of", lambda pod: np.zeros(4))
    with pytest.raises(ValueError, match=message):
        compile_for(jnp.sum, x, topology="v5e:2x2", mesh=mesh)


def test_only_chips_with_a_compiler_are_offered_to_compile_for():
    with pytest.raises(ValueError, match="chip of v4, v5e, v5p, v6e, tpu7x, h100: write"):
        compile_for(jnp.sum, jnp.ones(4), topology="v9:2x4")
