"""A live cache in another capacity, on another mesh, or on disk: the same tokens, and it goes on."""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.cache import checkpoint
from distattn.cache.kv_cache import empty_like
from distattn.cache.layout import letters_in
from distattn.cache.resize import grown, shrunk
from distattn.testing import collectives
from tests.cases import KINDS, cache_sharding, mesh_of
from tests.tolerance import assert_close

B, K, H, V, N = 2, 2, 8, 4, 4
# The positions that each row holds: of the first some have been evicted, two appended at one position.
HELD = ([0, 1, *range(6, 15), 15, 15, *range(16, 20)], list(range(8)))
NEXT = (21, 8)
STORED = ("key", "value", "key_scale", "value_scale")
FORMS = {
    "float32": {"dtype": jnp.float32},
    "bfloat16_layers": {"dtype": jnp.bfloat16, "layers": 3},
    "int8_layers": {"dtype": jnp.int8, "layers": 2},
    "float8": {"dtype": jnp.float8_e4m3fn},
}


def grid(kind: str = "auto", names: tuple[str, ...] = ("rows", "kv", "heads")) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2, 2), names, (KINDS[kind],) * 3, devices=jax.devices())


PLACES = {
    "one": None,
    "2": cache_sharding(mesh_of(2, "auto")),
    "3": cache_sharding(mesh_of(3, "auto")),
    "4": cache_sharding(mesh_of(4, "explicit")),
    "8": cache_sharding(mesh_of(8, "auto")),
    "8_explicit": cache_sharding(mesh_of(8, "explicit")),
    "8_other_name": cache_sharding(jax.make_mesh((8,), ("ring",), (KINDS["auto"],)), "ring"),
    "tuple": cache_sharding(grid(), ("rows", "kv", "heads")),
    "grid": cache_sharding(grid(), batch="rows", heads="heads"),
}


def tokens(rng: np.random.Generator, count: int, layers: int | None = None) -> tuple:
    lead = (B, count, K) if layers is None else (layers, B, count, K)
    return tuple(jnp.asarray(rng.normal(size=(*lead, x)), jnp.float32) for x in (H, V))


@functools.cache
def filled(
    place: str, form: str = "float32", capacity: int = 24, placement: str = "least_loaded"
) -> distattn.KVCache:
    """A cache of two ragged rows, in slots here and there, or with placement 'block' the first ones.

    The tokens are the same in all places. No program of the cache makes them, nor has to be compiled.
    """
    sizes = {"value_dim": V, "placement": placement, **FORMS[form], "sharding": PLACES[place]}
    new = jax.eval_shape(lambda: distattn.KVCache.create(B, capacity, K, H, **sizes))
    arrays = {name: np.zeros((x := getattr(new, name)).shape, x.dtype) for name in new.arrays}
    arrays["positions"][:] = -1
    rng = np.random.default_rng(0)
    for row, held in enumerate(HELD):
        slots = np.arange(capacity)
        if placement != "block":
            slots = np.random.default_rng(row).permutation(capacity)
        slots = slots[: len(held)]
        arrays["positions"][row, slots] = held
        np.add.at(arrays["counts"][row], slots * new.layout.devices // capacity, 1)
        for name in (x for x in STORED if x in arrays):
            at = (row, slots) if new.layers is None else (slice(None), row, slots)
            arrays[name][at] = numbers(rng, name, arrays[name][at])
    arrays["next_position"][:] = NEXT
    arrays["appended"][:], arrays["placed"][:], arrays["overflow"][:] = (3, 1), (27, 8), (0, 1)
    arrays["refused"][:] = (0, 9)
    return jax.device_put(dataclasses.replace(new, **arrays), lies(new))


def numbers(rng: np.random.Generator, name: str, like: np.ndarray) -> np.ndarray:
    """What may be stored under a name."""
    if "scale" in name:
        return rng.uniform(0.01, 0.02, like.shape).astype(like.dtype)
    if like.dtype == np.int8:
        return rng.integers(-127, 128, like.shape, np.int8)
    return rng.normal(size=like.shape).astype(like.dtype)


def lies(cache: distattn.KVCache) -> distattn.KVCache:
    """The sharding of each array, in the structure of the cache."""
    letters = letters_in(cache.arrays).items()
    with cache.layout.context():
        shardings = {name: cache.layout.target(x) for name, x in letters}
    return dataclasses.replace(cache, **shardings)


def by_token(cache: distattn.KVCache, start: int = 0, stop: int | None = None) -> list[list]:
    """Position and bytes of each occupied slot, in order, for each row: the slots from start on."""
    tags = np.asarray(cache.positions)[:, start:stop]
    stored = [x for name in STORED if (x := getattr(cache, name)) is not None]
    axis = 0 if cache.layers is None else 1
    rows = []
    for row in range(B):
        parts = [np.moveaxis(np.take(np.asarray(x), row, axis=axis), axis, 0) for x in stored]
        parts = [x[start:stop] for x in parts]
        slots = np.flatnonzero(tags[row] >= 0)
        rows.append(sorted((int(tags[row, s]), *(x[s].tobytes() for x in parts)) for s in slots))
    return rows


def check_whole(cache: distattn.KVCache) -> None:
    """That counts say what tags say, and that all is and lies as `create` would have it."""
    tags = np.asarray(cache.positions).reshape(B, cache.layout.devices, -1)
    assert np.array_equal(cache.counts, (tags >= 0).sum(axis=2))
    new = empty_like(cache.layout, cache._sizes())
    assert jax.tree.structure(new) == jax.tree.structure(cache)
    leaves = zip(*map(jax.tree.leaves, (cache, new, lies(cache))), strict=True)
    for got, want, sharding in leaves:
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(sharding, got.ndim)


def check_same(cache: distattn.KVCache, before: distattn.KVCache) -> None:
    check_whole(cache)
    assert by_token(cache) == by_token(before)
    for name in ("next_position", "appended", "placed", "overflow", "refused"):
        assert np.array_equal(getattr(cache, name), getattr(before, name))


@jax.jit
def go_on(cache: distattn.KVCache) -> tuple[jax.Array, jax.Array]:
    """What the next three tokens attend to, in the last layer; and whether there was no place."""
    rng = np.random.default_rng(1)
    cache = cache.append(*tokens(rng, 3, cache.layers))
    query = jnp.asarray(rng.normal(size=(B, 3, N, H)), jnp.float32)
    layer = None if cache.layers is None else cache.layers - 1
    return cache.attend(query, layer=layer), cache.overflow


@functools.cache
def goes_on(form: str) -> np.ndarray:
    """The same, of a cache on one device to which nothing has happened."""
    out, overflow = go_on(filled("one", form, 32))
    assert not overflow.any()
    return np.asarray(out)


def check_goes_on(cache: distattn.KVCache, form: str) -> None:
    out, overflow = go_on(cache)
    assert not overflow.any()
    # Each is compared with the other, not with the oracle: the roundings of both.
    assert_close(out, goes_on(form), jnp.float32, 24, factor=2, what="goes on")


# From where, in what form, to where, with what capacity, and how many slots that gives.
MOVES = {
    "fewer_devices": ("8", "float32", "4", None, 24),
    "larger_on_more_devices": ("4", "bfloat16_layers", "8_explicit", 100, 104),
    "to_a_number_that_does_not_divide": ("8", "int8_layers", "3", 25, 27),
    "from_a_number_that_does_not_divide": ("3", "float8", "8", 26, 32),
    "to_one": ("8_explicit", "bfloat16_layers", "one", 21, 21),
    "from_one": ("one", "float8", "8", 21, 24),
    "smaller_on_fewer": ("8", "float32", "2", 20, 20),
    "rows_and_heads": ("8", "int8_layers", "grid", 24, 24),
    "from_rows_and_heads": ("grid", "float32", "tuple", 30, 32),
    "other_name": ("8", "float32", "8_other_name", None, 24),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_cache_moves_to_another_mesh_and_goes_on(move):
    source, form, target, capacity, slots = MOVES[move]
    before = filled(source, form)
    after = before.resize(capacity, sharding=PLACES[target])
    assert after.capacity == slots
    check_same(after, before)
    check_goes_on(after, form)


@pytest.mark.parametrize(
    ("place", "form"),
    [
        ("one", "float32"),
        ("8", "bfloat16_layers"),
        ("8_explicit", "int8_layers"),
        ("grid", "float8"),
    ],
)
def test_a_cache_grows_and_shrinks_where_it_lies(place, form):
    before = filled(place, form)
    large = before.resize(46)
    assert large.capacity == (48 if "8" in place else 46)
    check_same(large, before)
    small = large.resize(17)
    assert small.capacity == {"one": 17, "grid": 18}.get(place, 24)
    check_same(small, before)


def test_growing_sends_nothing():
    cache = filled("8", "int8_layers")
    program = jax.jit(lambda x: grown(cache.layout, x, 48)).lower(cache.arrays).compile()
    assert collectives(program.as_text()) == {}


def test_shrinking_sends_nothing_where_all_devices_have_room():
    large = filled("8").resize(80)
    program = (
        jax.jit(lambda x: shrunk(large.layout, x, 24, surplus=0)).lower(large.arrays).compile()
    )
    assert collectives(program.as_text()) == {}
    small = large.resize(24)
    for device in range(8):
        own = by_token(small, 3 * device, 3 * device + 3)
        assert own == by_token(large, 10 * device, 10 * device + 10)


def test_no_device_needs_memory_for_more_than_its_own_share():
    cache = distattn.KVCache.create(1, 16384, 2, 64, dtype=jnp.bfloat16, sharding=PLACES["8"])
    shrink = functools.partial(shrunk, cache.layout, slots=8192, surplus=1024)
    program = jax.jit(shrink).lower(cache.arrays).compile()
    assert set(collectives(program.as_text())) == {"all-reduce"}
    memory = program.memory_analysis()  # of one device
    shares = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 1.25 * shares


@pytest.mark.parametrize(
    ("place", "form"),
    [("8", "float32"), ("8_explicit", "float8"), ("8", "int8_layers"), ("grid", "bfloat16_layers")],
)
def test_a_surplus_goes_to_the_devices_that_hold_the_fewest(place, form):
    before = filled(place, form, capacity=64, placement="block")
    devices = before.layout.devices
    full = np.asarray(before.counts)
    after = before.resize(24)
    check_same(after, before)
    assert (full[0] > 0).sum() < devices, "the first devices hold all"
    counts = np.asarray(after.counts)
    # Those that had a surplus are full; what they gave lies evenly on the others.
    given = full > 24 // devices
    assert (counts[given] == 24 // devices).all()
    for row in np.flatnonzero(given.any(axis=1)):
        others = counts[row][~given[row]]
        assert others.max() - others.min() <= 1


def test_bits_survive_the_way_between_devices():
    before = filled("8", capacity=64, placement="block")
    strange = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    strange.view(np.uint32)[0] |= 0x1234  # a payload
    value = np.broadcast_to(strange, before.value.shape)
    before = dataclasses.replace(before, value=jax.device_put(value, before.value.sharding))
    check_same(before.resize(24), before)


def test_placement_changes_and_stays():
    cache = filled("8", placement="round_robin")
    assert cache.resize(48).placement == "round_robin"
    assert cache.resize(sharding=None).placement == "round_robin"
    assert cache.resize(placement="block").placement == "block"


def test_the_same_size_and_place_is_the_same_cache():
    cache = filled("8")
    assert cache.resize().key is cache.key


def test_axes_of_the_same_mesh():
    cache = filled("grid")
    moved = cache.resize(sharding=P(None, ("kv", "rows")))
    assert moved.layout.slots == ("rows", "kv")
    assert moved.layout.batch == moved.layout.heads == ()
    check_same(moved, cache)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_mesh_the_context_has(kind, tmp_path):
    before = filled("8", "int8_layers", 64, "block")
    spare = jax.make_mesh((2, 4), ("copies", "kv"), (KINDS[kind],) * 2)  # each slot lies twice
    with jax.set_mesh(mesh_of(8, kind)):
        on_four = before.resize(24, sharding=cache_sharding(spare)).resize(20)
        check_same(on_four, before)
        check_same(on_four.resize(sharding=cache_sharding(mesh_of(3, kind))), before)
        check_same(on_four.resize(sharding=None), before)
        on_four.save(tmp_path)
    with jax.set_mesh(spare):
        check_same(distattn.KVCache.restore(tmp_path, sharding=P(None, "kv")), before)
        check_same(distattn.KVCache.restore(tmp_path, capacity=64, sharding=PLACES["8"]), before)
        check_same(distattn.KVCache.restore(tmp_path), before)


def test_a_row_that_does_not_fit_is_refused_and_nothing_changes():
    cache = filled("8", capacity=24)
    held = np.asarray(cache.counts)
    with pytest.raises(
        ValueError, match=r"sequence 0 holds 17 tokens.*capacity=16 .*evict.*at least 17"
    ):
        cache.resize(15)
    with pytest.raises(ValueError, match=r"sequence 0 holds 17 tokens.*too many: \[0, 1\]"):
        cache.resize(7, sharding=None)
    assert np.array_equal(cache.counts, held)
    check_goes_on(cache, "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity is 0.*at least 1"),
        ({"sharding": "kv"}, "sharding is 'kv'; it must be a jax.NamedSharding.*or None"),
        ({"sharding": grid()}, r"sharding is Mesh\(.*must be a jax.NamedSharding"),
        ({"sharding": P(None, "x")}, "'x' is not an axis of the mesh"),
        (
            {"sharding": cache_sharding(grid(), heads=("rows", "heads"))},
            "num_kv_heads is 2.*4 devices",
        ),
        ({"placement": "left"}, "placement is 'left'.*one of"),
    ],
)
def test_a_wrong_resize_says_what_to_pass(arguments, message):
    with pytest.raises(ValueError, match=message):
        filled("8").resize(**arguments)


def test_under_jit_there_is_no_resize_and_no_save(tmp_path):
    cache = filled("8")
    with pytest.raises(ValueError, match="resize was called under a trace.*outside of jit"):
        jax.jit(lambda cache: cache.resize(48))(cache)
    with pytest.raises(ValueError, match="save was called under a trace.*outside of jit"):
        jax.jit(lambda cache: cache.save(tmp_path))(cache)


@pytest.mark.parametrize("move", MOVES)
def test_a_cache_is_restored_on_other_devices_and_goes_on(move, tmp_path):
    source, form, target, capacity, slots = MOVES[move]
    before = filled(source, form)
    assert before.save(tmp_path) == 0
    after = distattn.KVCache.restore(tmp_path, capacity=capacity, sharding=PLACES[target])
    assert after.capacity == slots
    check_same(after, before)
    check_goes_on(after, form)


def test_another_capacity_and_placement_when_restored(tmp_path):
    before = filled("8")
    before.save(tmp_path)
    place = {"sharding": PLACES["4"]}
    for capacity, slots in ((40, 40), (17, 20)):
        after = distattn.KVCache.restore(tmp_path, capacity=capacity, placement="block", **place)
        assert (after.capacity, after.placement) == (slots, "block")
        check_same(after, before)
    with pytest.raises(ValueError, match=r"sequence 0 holds 17 tokens.*capacity=16"):
        distattn.KVCache.restore(tmp_path, capacity=16, **place)


def test_steps_are_numbered_and_never_overwritten(tmp_path):
    directory = tmp_path / "new" / "caches"
    caches = [filled("2"), filled("2").rewind([18, 8]), filled("2").rewind(4)]
    assert caches[0].save(directory) == 0
    assert caches[1].save(str(directory), 7) == 7
    assert caches[2].save(directory) == 8
    for step, cache in ((0, caches[0]), (7, caches[1]), (8, caches[2]), (None, caches[2])):
        check_same(distattn.KVCache.restore(directory, step, sharding=PLACES["8"]), cache)
    with pytest.raises(ValueError, match=r"step=7 is in .*\[0, 7, 8\].*pass another"):
        caches[0].save(directory, 7)
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match=f"step is {wrong!r}.*int of at least 0"):
            caches[0].save(directory, wrong)
    with pytest.raises(FileNotFoundError, match=r"no step 3 in .*: \[0, 7, 8\]"):
        distattn.KVCache.restore(directory, 3)
    with pytest.raises(FileNotFoundError, match=r"no step in .*complete steps there: \[\]"):
        distattn.KVCache.restore(tmp_path)


def test_a_step_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("distattn.cache.checkpoint.FORMAT", 3)
    filled("one").save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"step 0 in .* format 3, .* reads the format 1; use the release"
    ):
        distattn.KVCache.restore(tmp_path)


def test_without_orbax_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ModuleNotFoundError, match=r"orbax.*pip install -e '\.\[checkpoint\]'"):
        filled("one").save(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"orbax.*pip install -e '\.\[checkpoint\]'"):
        distattn.KVCache.restore(tmp_path)


def test_a_cache_of_some_processes_only_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "present", lambda: [0, 1])
    for call in (filled("one").save, distattn.KVCache.restore):
        with pytest.raises(
            NotImplementedError, match="all processes, ranks 0-1, .* of rank 0; use"
        ):
            call(tmp_path)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("steps")
    filled("8", capacity=2048).save(directory)
    filled("8", capacity=2048).rewind([18, 8]).save(directory)
    return directory


def damaged(file: Path, how: str) -> None:
    numbers = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(numbers[: len(numbers) // 2])
    else:
        numbers[len(numbers) // 2] ^= 0x11
        file.write_bytes(numbers)


@pytest.mark.parametrize("how", ["removed", "cut short", "changed"])
@pytest.mark.parametrize("which", ["largest", "manifest"])
def test_a_damaged_step_is_named_and_the_one_before_it_is_read(how, which, two_steps, tmp_path):
    directory = tmp_path / "steps"
    shutil.copytree(two_steps, directory)
    files = [path for path in (directory / "1").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    if which == "manifest":
        file = directory / "1" / "manifest.json"
    damaged(file, how)
    what = {"removed": "is missing", "cut short": "bytes, and", "changed": "has changed"}[how]
    what = "cannot be read" if which == "manifest" else what
    name = file.relative_to(directory / "1").as_posix()
    with pytest.raises(OSError, match=f"step 1 in .* damaged: file {name} .*{what}.*pass step=0"):
        distattn.KVCache.restore(directory, sharding=PLACES["8"])
    restored = distattn.KVCache.restore(directory, 0, sharding=PLACES["8"])
    check_same(restored, filled("8", capacity=2048))

    damaged(directory / "0" / "manifest.json", "changed")
    with pytest.raises(OSError, match=r"step 1 in .*; no earlier step is whole"):
        distattn.KVCache.restore(directory)


# A cache of 32 MB is saved again and again, as step 0, 1, ...; its next position is the step.
SAVES = """
import dataclasses, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")
from distattn import KVCache
cache = KVCache.create(1, 1 << 16, 1, 64, dtype=jnp.float32)
key = np.random.default_rng(0).standard_normal(cache.key.shape, np.float32)
cache = dataclasses.replace(cache, key=jnp.asarray(key), value=jnp.asarray(key[..., ::-1]))
while True:
    step = cache.save(sys.argv[1])
    cache = dataclasses.replace(cache, next_position=cache.next_position + 1)
"""


def kill_in_a_save(directory: Path) -> None:
    """Starts the program and ends it, not gently, when a step after the first is half written."""
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES, directory],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(60_000):
            if (directory / "1").exists() and any(directory.glob("*.unfinished/*/**/d/*")):
                break
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.001)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_save_that_is_killed_leaves_the_steps_before(tmp_path):
    for attempt in range(5):  # the signal may come just when a step has been completed
        directory = tmp_path / str(attempt)
        kill_in_a_save(directory)
        if unfinished := sorted(directory.glob("*.unfinished")):
            break
    assert [int(path.stem) for path in unfinished] == [step := int(unfinished[0].stem)]
    with pytest.warns(
        UserWarning, match=rf"step {step - 1} of .* restored; interrupted.*\[{step}\]"
    ):
        cache = distattn.KVCache.restore(directory, sharding=PLACES["8"])
    key = np.random.default_rng(0).standard_normal(cache.key.shape, np.float32)
    assert int(cache.next_position[0]) == step - 1
    assert np.array_equal(cache.key, key)
    assert np.array_equal(cache.value, key[..., ::-1])
    with pytest.raises(FileNotFoundError, match=rf"no step {step} in .*interrupted.*\[{step}\]"):
        distattn.KVCache.restore(directory, step)
    small = filled("2")
    assert small.save(directory) == step, "in the place of what was interrupted"
    assert list(directory.glob("*.unfinished")) == []
    check_same(distattn.KVCache.restore(directory), small)


def test_a_save_that_fails_at_the_last_moment_leaves_no_step(tmp_path, monkeypatch):
    cache = filled("one")
    cache.save(tmp_path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("distattn.cache.checkpoint.write_manifest", fail)
    with pytest.raises(OSError, match="no space left"):
        cache.save(tmp_path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"step 0 of .* interrupted, and not complete: \[1\]"):
        check_same(distattn.KVCache.restore(tmp_path), cache)


def test_each_device_reads_its_own_share(tmp_path):
    filled("8", capacity=32).save(tmp_path)
    cache = distattn.KVCache.restore(tmp_path, sharding=PLACES["3"])
    assert cache.key.sharding == NamedSharding(PLACES["3"].mesh, P(None, "kv", None, None))
    assert [shard.data.shape[1] for shard in cache.key.addressable_shards] == [11, 11, 11]
    check_same(cache, filled("8", capacity=32))
