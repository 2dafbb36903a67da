"""A cache against a plain list of tokens for each row, through operations drawn at random.

In a normal run two hundred steps, else as many as the environment variable DISTATTN_RANDOM_STEPS says.
"""

import dataclasses
import functools
import os
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distattn import KVCache
from distattn.testing import reference
from tests.cases import cache_sharding, check_copies, mesh_of
from tests.tolerance import assert_close

B, K, H, V, N = 3, 1, 4, 4, 2
CAPACITY, SIZES = 24, (1, 3)
# Three ways to lie, so that little compiles; the first is where a cache starts, each token there twice.
LAYOUTS = (
    {"sharding": cache_sharding(mesh_of(8, "auto")), "capacity": CAPACITY, "replicas": 2},
    {"sharding": cache_sharding(mesh_of(3, "explicit")), "capacity": CAPACITY, "replicas": 1},
    {"sharding": None, "capacity": 2 * CAPACITY, "replicas": 1},
)
STEPS_PER_EXAMPLE = 25
STEPS = int(os.environ.get("DISTATTN_RANDOM_STEPS", 8 * STEPS_PER_EXAMPLE))


@dataclasses.dataclass
class Row:
    """What a row is to be: its tokens in no order, and the numbers of `KVCache`."""

    tokens: list[tuple[int, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    next_position: int = 0
    appended: int = 0
    placed: int = 0
    overflow: bool = False
    refused: int = 0

    def append(self, tokens: list, fits: bool) -> None:
        self.overflow = not fits
        self.appended = len(tokens) if fits else 0
        self.refused += 0 if fits else len(tokens)
        if fits:
            self.tokens = [*self.tokens, *tokens]
            self.placed += len(tokens)
            self.next_position = max([self.next_position, *(p + 1 for p, *_ in tokens)])

    def keep(self, kept) -> None:
        self.tokens = [token for token in self.tokens if kept(token[0])]


# Each is compiled once for a layout and a number of tokens, and writes in place.
def compiled(f):
    return functools.partial(jax.jit, donate_argnums=0)(f)


append = compiled(lambda cache, key, value, lengths: cache.append(key, value, lengths=lengths))
append_at = compiled(lambda cache, key, value, at: cache.append(key, value, positions=at))
append_to = compiled(lambda cache, key, value, owner: cache.append(key, value, owner=owner))
reset = compiled(lambda cache, rows: cache.reset(rows))
rewind = compiled(lambda cache, lengths: cache.rewind(lengths))
evict = compiled(lambda cache, window, first: cache.evict(window, keep_first=first))
accept = compiled(lambda cache, nodes, lengths: cache.accept(nodes, lengths))
fork = compiled(lambda cache, source, target: cache.fork(source, target))
attend = jax.jit(lambda cache, query, at: cache.attend(query, query_positions=at))


@functools.cache
def blank() -> KVCache:
    return KVCache.create(B, num_kv_heads=K, head_dim=H, dtype=jnp.float32, **LAYOUTS[0])


def create() -> KVCache:
    """A copy, whose buffers the first step may take."""
    return jax.tree.map(jnp.copy, blank())


def new_tokens(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    key = rng.normal(size=(B, count, K, H)).astype(np.float32)
    return key, rng.normal(size=(B, count, K, V)).astype(np.float32)


def int_rows(low: int, high: int):
    """int32[B]."""
    numbers = st.lists(st.integers(low, high), min_size=B, max_size=B)
    return numbers.map(lambda x: np.array(x, np.int32))


def int_tokens(count: int, low: int, high: int):
    """int32[B, T]."""
    numbers = st.lists(st.integers(low, high), min_size=B * count, max_size=B * count)
    return numbers.map(lambda x: np.array(x, np.int32).reshape(B, count))


seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from(SIZES)
row_index = st.integers(0, B - 1)


class Life(RuleBasedStateMachine):
    """Rules change the cache and the model; the invariants compare them after each."""

    @initialize()
    def begin(self):
        self.cache = create()
        self.rows = [Row() for _ in range(B)]

    @property
    def each(self) -> int:
        return self.cache.capacity // self.cache.layout.devices

    # What tokens come.

    @rule(seed=seeds, count=sizes, lengths=int_rows(0, 3), times=st.sampled_from((1, 1, 2, 7)))
    def append(self, seed, count, lengths, times):
        lengths = np.minimum(lengths, count)
        rng = np.random.default_rng(seed)
        for _ in range(times):
            key, value = new_tokens(rng, count)
            self.cache = append(self.cache, key, value, lengths)
            for b, row in enumerate(self.rows):
                at = row.next_position + np.arange(lengths[b])
                tokens = [(int(p), key[b, t], value[b, t]) for t, p in enumerate(at)]
                row.append(tokens, len(row.tokens) + len(tokens) <= self.cache.capacity)

    @rule(seed=seeds, at=int_tokens(3, -2, 60))
    def append_at_positions(self, seed, at):
        key, value = new_tokens(np.random.default_rng(seed), 3)
        self.cache = append_at(self.cache, key, value, at)
        for b, row in enumerate(self.rows):
            tokens = [(int(at[b, t]), key[b, t], value[b, t]) for t in range(3) if at[b, t] >= 0]
            row.append(tokens, len(row.tokens) + len(tokens) <= self.cache.capacity)

    @rule(seed=seeds, data=st.data())
    def append_to_owners(self, seed, data):
        devices = self.cache.layout.devices
        owner = data.draw(int_tokens(3, 0, devices - 1))
        counts = np.array(self.cache.counts)
        key, value = new_tokens(np.random.default_rng(seed), 3)
        self.cache = append_to(self.cache, key, value, owner)
        for b, row in enumerate(self.rows):
            tokens = [(row.next_position + t, key[b, t], value[b, t]) for t in range(3)]
            added = np.bincount(owner[b], minlength=devices)
            row.append(tokens, bool((counts[b] + added <= self.each).all()))
            if not row.overflow:
                assert np.array_equal(self.cache.counts[b], counts[b] + added)

    @precondition(lambda self: any(len(x.tokens) > self.cache.capacity - 3 for x in self.rows))
    @rule(seed=seeds)
    def refused_outside_of_jit(self, seed):
        with pytest.raises(ValueError, match="gets 3 new tokens.*nothing was written"):
            self.cache.append(*new_tokens(np.random.default_rng(seed), 3))

    # What happens to rows.

    @rule(gone=st.lists(st.booleans(), min_size=B, max_size=B))
    def reset(self, gone):
        self.cache = reset(self.cache, np.array(gone))
        self.rows = [Row() if g else row for g, row in zip(gone, self.rows, strict=True)]

    @rule(back=int_rows(-1, 8))
    def rewind(self, back):
        lengths = np.array([row.next_position for row in self.rows], np.int32) - back
        self.cache = rewind(self.cache, lengths)
        for row, length in zip(self.rows, np.maximum(lengths, 0), strict=True):
            row.keep(lambda p, length=length: p < length)
            gone = max(row.next_position - int(length), 0)
            row.next_position -= gone
            row.appended = max(row.appended - gone, 0)

    @rule(window=int_rows(0, 30), first=int_rows(0, 4))
    def evict(self, window, first):
        self.cache = evict(self.cache, window, first)
        for row, w, f in zip(self.rows, window, first, strict=True):
            row.keep(lambda p, n=row.next_position, w=w, f=f: p >= n - w or p < f)

    @rule(seed=seeds, lengths=int_rows(0, 3), order=st.permutations(range(3)), kept=int_rows(0, 3))
    def append_and_accept(self, seed, lengths, order, kept):
        self.append(seed, 3, lengths, 1)
        # A path goes down the tree; of its nodes a row has only those that it has just got.
        paths = np.full((B, 3), -1, np.int32)
        for b, row in enumerate(self.rows):
            nodes = sorted(order[: kept[b]])
            paths[b, : len(nodes)] = nodes
            start, nodes = row.next_position - row.appended, [t for t in nodes if t < row.appended]
            place = {start + node: start + i for i, node in enumerate(nodes)}
            row.keep(lambda p, place=place, start=start: p < start or p in place)
            row.tokens = [(place.get(p, p), *rest) for p, *rest in row.tokens]
            row.next_position, row.appended = start + len(nodes), len(nodes)
        self.cache = accept(self.cache, paths, kept)

    @rule(rows=st.tuples(row_index, row_index))
    def fork(self, rows):
        source, target = rows
        self.cache = fork(self.cache, np.array([source], np.int32), np.array([target], np.int32))
        self.rows[target] = dataclasses.replace(self.rows[source])

    # What happens to the cache.

    @rule(layout=st.sampled_from(LAYOUTS))
    def resize(self, layout):
        held = max(len(row.tokens) for row in self.rows)
        if held > layout["capacity"]:
            with pytest.raises(ValueError, match=rf"holds {held} tokens.*nothing was changed"):
                self.cache.resize(**layout)
        else:
            self.cache = self.cache.resize(**layout)
            assert self.cache.capacity == layout["capacity"]

    @rule(layout=st.sampled_from(LAYOUTS))
    def save_and_restore(self, layout):
        with tempfile.TemporaryDirectory() as directory:
            self.cache.save(directory)
            if max(len(row.tokens) for row in self.rows) <= layout["capacity"]:
                self.cache = KVCache.restore(directory, **layout)

    # What is true after each.

    @invariant()
    def tags_are_the_positions(self):
        tags = np.asarray(self.cache.positions)
        for row, own in zip(self.rows, tags, strict=True):
            assert sorted(own[own >= 0]) == sorted(p for p, *_ in row.tokens)
        shares = tags.reshape(B, self.cache.layout.devices, -1)
        assert np.array_equal(self.cache.counts, (shares >= 0).sum(axis=2))

    @invariant()
    def replicas_equal_their_sources(self):
        assert (self.cache.replica is None) == (self.cache.layout.devices != 8)
        check_copies(self.cache)

    @invariant()
    def numbers_are_those_of_the_model(self):
        for name in ("next_position", "appended", "placed", "overflow", "refused"):
            assert getattr(self.cache, name).tolist() == [getattr(row, name) for row in self.rows]

    @rule(seed=seeds, count=sizes, back=st.integers(0, 6))
    def attend(self, seed, count, back):
        rng = np.random.default_rng(seed)
        query = rng.normal(size=(B, count, N, H)).astype(np.float32)
        last = np.array([[row.next_position] for row in self.rows])
        at = np.maximum(last - 1 - back + np.arange(count), 0).astype(np.int32)
        self.check(query, at)

    @invariant()
    def attends_to_all_of_them(self):
        query = np.linspace(-1, 1, B * N * H, dtype=np.float32).reshape(B, 1, N, H)
        self.check(query, np.full((B, 1), 1000, np.int32))

    def check(self, query: np.ndarray, at: np.ndarray) -> None:
        """That the cache attends as the oracle does to the tokens of the model."""
        longest = max(1, *(len(row.tokens) for row in self.rows))
        key, value = np.zeros((B, longest, K, H)), np.zeros((B, longest, K, V))
        positions = np.full((B, longest), -1)
        for b, row in enumerate(self.rows):
            for s, (p, k, v) in enumerate(row.tokens):
                positions[b, s], key[b, s], value[b, s] = p, k, v
        options = {"is_causal": True, "query_positions": at, "key_positions": positions}
        want = reference.dot_product_attention(query, key, value, **options)[0]
        got = attend(self.cache, query, at)
        # Values are of the order 1, and a few averages of them may all be next to nothing.
        assert_close(got, want, jnp.float32, CAPACITY, what="attend", unit=1.0)


Life.TestCase.settings = hypothesis.settings(
    max_examples=max(1, STEPS // STEPS_PER_EXAMPLE),
    stateful_step_count=STEPS_PER_EXAMPLE,
    print_blob=True,
)
TestLife = Life.TestCase


def test_a_thousand_mixed_steps_compile_nothing():
    rng = np.random.default_rng(0)
    rows = np.arange(B)

    def numbers(low: int, high: int, *shape: int) -> np.ndarray:
        return rng.integers(low, high, shape, np.int32)

    def query(cache: KVCache, count: int) -> KVCache:
        asked = rng.normal(size=(B, count, N, H)).astype(np.float32)
        jax.block_until_ready(attend(cache, asked, numbers(0, 9, B, count)))
        return cache

    steps = [
        *(lambda c, t=t: append(c, *new_tokens(rng, t), numbers(0, t + 1, B)) for t in SIZES),
        lambda c: append_at(c, *new_tokens(rng, 3), numbers(0, 60, B, 3)),
        lambda c: append_to(c, *new_tokens(rng, 3), numbers(0, 8, B, 3)),
        lambda c: reset(c, rng.random(B) < 0.2),
        lambda c: rewind(c, numbers(0, 60, B)),
        lambda c: evict(c, numbers(0, 30, B), numbers(0, 4, B)),
        lambda c: accept(c, np.sort(numbers(0, 3, B, 3), axis=1), numbers(0, 4, B)),
        lambda c: fork(c, *(rng.choice(rows, 1).astype(np.int32) for _ in range(2))),
        *(functools.partial(query, count=t) for t in SIZES),
    ]
    cache = create()
    for step in steps:
        cache = step(cache)
    compilations = []

    def listen(event: str, duration_s: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_s)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3 + 1)(jnp.float32(0))
        assert compilations, "a compilation is seen"
        compilations.clear()
        for step in rng.choice(len(steps), 1000):
            # One at a time: the devices share threads, and programs under way can wait for each other.
            cache = jax.block_until_ready(steps[step](cache))
        assert compilations == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
