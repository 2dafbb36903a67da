"""Collectives in the text of HLO, written by hand if no compiler here writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from distattn.testing.hlo import Program

MESH = {"host": 2, "chip": 4}
PAIRS = "{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}"


def program(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return Program(f"HloModule m\n\nENTRY %main (x: f32[4]) -> f32[4] {{\n{body}\n}}\n")


@pytest.mark.parametrize(
    ("attribute", "axes"),
    [
        ("replica_groups={}", ("host", "chip")),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true", ("chip",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("host",)),
        ("replica_groups=[2,4]<=[8]", ("chip",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", ("host",)),
        ("replica_groups=[1,8]<=[8]", ("host", "chip")),
        ("replica_groups=[8,1]<=[8]", ()),
    ],
)
def test_axes_of_groups(attribute, axes):
    (found,) = program(
        "%x = f32[4]{0} parameter(0)",
        f"ROOT %r = f32[4]{{0}} all-reduce(%x), channel_id=1, {attribute}, to_apply=%add",
    ).collectives()
    assert (found.kind, found.result_bytes, found.runs) == ("all-reduce", 16, 1)
    assert found.axes(MESH) == axes


@pytest.mark.parametrize(
    ("pairs", "axes"),
    [
        (PAIRS, ("chip",)),
        ("{{0,4},{4,0}}", ("host",)),
        ("{{0,5}}", ("host", "chip")),
        ("{}", ()),
    ],
)
def test_axes_of_pairs(pairs, axes):
    (found,) = program(
        f"ROOT %r = f32[4]{{0}} collective-permute(%x), source_target_pairs={pairs}, metadata={{a=1}}"
    ).collectives()
    assert found.axes(MESH) == axes


def test_a_send_and_its_receive_are_one_round_between_devices_that_are_named_by_id():
    def exchange(turn, x, target):
        meeting = f'_xla_host_transfer_rendezvous="p{turn}",_xla_megascale_target={{{target}}}'
        attributes = f"is_host_transfer=true, frontend_attributes={{{meeting}}}"
        return (
            f"%s{turn} = (f32[4]{{0}}, u32[], token[]) send({x}, %t), channel_id={2 * turn}, {attributes}",
            f"%r{turn} = (f32[4]{{0}}, u32[], token[]) recv(%t), channel_id={2 * turn + 1}, {attributes}",
            f"%d{turn} = (f32[4]{{0}}, token[]) recv-done(%r{turn}), channel_id={2 * turn + 1}",
            f"%x{turn} = f32[4]{{0}} get-tuple-element(%d{turn}), index=0",
        )

    found = program(
        "%x = f32[4]{0} parameter(0)",
        "%t = token[] after-all()",
        *exchange(0, "%x", "{100000->200000},{200000->100000}"),
        *exchange(1, "%x0", "{100000->100001},{200000->200001}"),
    )
    ids = [100000 + rank for rank in range(4)] + [200000 + rank for rank in range(4)]
    kinds = [(x.kind, x.result_bytes, x.axes(MESH, ids)) for x in found.collectives()]
    expected = [(kind, 16, ("host",)) for kind in ("send", "recv")]
    expected += [(kind, 16, ("chip",)) for kind in ("send", "recv")]
    assert kinds == expected
    assert found.rounds == 2
    assert next(found.collectives()).axes(MESH) == ("host", "chip")  # ids unknown: any of them


LOOP = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %y = f32[4]{{0}} collective-permute(%x), channel_id=1, source_target_pairs={{{{0,1}},{{1,0}}}}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%next, %y)
}}

%condition (p: (s32[], f32[4])) -> pred[] {{
  %limit = s32[] constant(7)
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction={direction}
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  %start = s32[] constant({start})
  %carry = (s32[], f32[4]{{0}}) tuple(%start, %x)
  %while = (s32[], f32[4]{{0}}) while(%carry), condition=%condition, body=%body{known}
  ROOT %out = f32[4]{{0}} get-tuple-element(%while), index=1
}}
"""


@pytest.mark.parametrize(
    ("start", "direction", "known", "runs"),
    [
        (0, "LT", "", 7),  # as XLA:TPU writes it
        (3, "LT", "", 4),
        (9, "LT", "", 0),
        (0, "GT", "", 1),  # not understood: once
        (0, "GT", ', backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
)
def test_how_often_a_loop_runs(start, direction, known, runs):
    found = Program(LOOP.format(start=start, direction=direction, known=known))
    (permute,) = found.collectives()
    assert permute.runs == found.rounds == runs


def test_before_any_optimisation_names_have_no_sign_and_functions_have_many_callers():
    found = Program(
        "HloModule m\n\n"
        "half.1 {\n"
        "  x.1 = f32[4]{0} parameter(0)\n"
        f"  ROOT p.1 = f32[4]{{0}} collective-permute(x.1), channel_id=1, source_target_pairs={PAIRS}\n"
        "}\n\n"
        "ENTRY main.2 {\n"
        "  x.2 = f32[4]{0} parameter(0)\n"
        "  a.1 = f32[4]{0} call(x.2), to_apply=half.1\n"
        "  b.1 = f32[4]{0} call(x.2), to_apply=half.1\n"
        "  ROOT c.1 = f32[4]{0} add(a.1, b.1)\n"
        "}\n"
    )
    (permute,) = found.collectives()
    assert permute.runs == 2
    assert found.rounds == 1  # neither call waits for the other


def test_rounds_of_compiled_programs():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    ring = [(i, (i + 1) % 8) for i in range(8)]

    def hop(x, _):
        return lax.ppermute(x, "x", ring), None

    def f(x):
        apart = lax.ppermute(x, "x", ring) + lax.ppermute(x, "x", ring[::-1][1:])
        one_by_one = lax.scan(hop, x, length=5)[0]
        return lax.psum(jnp.sin(apart * one_by_one), "x")

    specs = PartitionSpec("x"), PartitionSpec()
    g = jax.shard_map(f, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)
    text = jax.jit(g).lower(jax.ShapeDtypeStruct((16, 4), np.float32)).compile().as_text()
    assert Program(text).rounds == 5 + 1
