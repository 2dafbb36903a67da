"""A small byte-level transformer in Flax NNX, the text it reads, and a step of its training.

Nothing in here knows of a mesh. Norm, MLP, logits and loss treat each byte alone, so they run on a
sequence that is split over devices, in any order, as they stand. Bytes meet in attention only, which is
an argument: `attend(query, key, value, positions)`. What an order changes is the positions, and these
come with the batch, for the rotation of query and key and for the mask.
"""

import dataclasses
import functools
import pydoc_data.topics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import order_free

BYTES = 256
SMALL = nnx.initializers.normal(0.02)  # so that at first a byte's embedding outweighs what is added
TEXT = np.frombuffer("\n\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Batch = dict[str, jax.Array]  # tokens, labels: int32[B, T]; positions: int32[T]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of the model."""

    dim: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    remat: bool = False  # a block's activations are computed again in the backward pass
    reproducible: bool = False  # the same bits on any number of devices, if attention gives them

    @property
    def parts(self) -> "Parts":
        """What belongs to the model."""
        return ORDER_FREE if self.reproducible else USUAL


# ------------------------------------------------------------------------ the model


def turn(
    first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The point (first, second), turned by an angle."""
    return first * cos - second * sin, second * cos + first * sin


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """In nats a byte, from logits and labels [B, T, 256]."""
    return optax.softmax_cross_entropy(logits, labels).mean()


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the model is made of, besides attention."""

    dot_general: Callable = jax.lax.dot_general
    RMSNorm: type[nnx.RMSNorm] = nnx.RMSNorm
    silu: Callable = nnx.silu
    turn: Callable = turn
    mean_loss: Callable = mean_cross_entropy


USUAL = Parts()
ORDER_FREE = Parts(
    **{part.name: getattr(order_free, part.name) for part in dataclasses.fields(Parts)}
)


def rotate(x: jax.Array, positions: jax.Array, turn: Callable) -> jax.Array:
    """Rotary position embedding: pairs of features turn by angles that go with the position.

    The product of a query and a key then depends on the distance of their positions. Positions are
    data: a token is rotated by where it stands in the text, whichever device and slot it lies in.
    """
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None]  # [T, 1, H/2]
    cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
    return jnp.concatenate(turn(*jnp.split(x, 2, axis=-1), cos, sin), axis=-1)


class Block(nnx.Module):
    """Attention with grouped heads, then SwiGLU, each behind an RMSNorm and added to the stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.parts = parts = config.parts
        linear = functools.partial(
            nnx.Linear, use_bias=False, dot_general=parts.dot_general, rngs=rngs
        )
        small = functools.partial(linear, kernel_init=SMALL)
        self.width = config.dim // config.heads
        hidden = 3 * config.dim
        self.attention_norm = parts.RMSNorm(config.dim, rngs=rngs)
        self.query = linear(config.dim, config.heads * self.width)
        self.key = linear(config.dim, config.kv_heads * self.width)
        self.value = linear(config.dim, config.kv_heads * self.width)
        self.attention_out = small(config.heads * self.width, config.dim)
        self.mlp_norm = parts.RMSNorm(config.dim, rngs=rngs)
        self.gate = linear(config.dim, hidden)
        self.up = linear(config.dim, hidden)
        self.down = small(hidden, config.dim)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attention) -> jax.Array:
        """[B, T, dim] to [B, T, dim]."""
        y = self.attention_norm(x)
        query, key, value = (
            project(y).reshape(*y.shape[:2], -1, self.width)
            for project in (self.query, self.key, self.value)
        )
        query, key = (rotate(y, positions, self.parts.turn) for y in (query, key))
        with jax.named_scope("attention"):  # the compiled program tells by it what moves for whom
            y = attend(query, key, value, positions)
        x = x + self.attention_out(y.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(self.parts.silu(self.gate(y)) * self.up(y))


class Transformer(nnx.Module):
    """Bytes to the logits of the byte behind each."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.remat = config.remat
        self.parts = parts = config.parts
        linear = functools.partial(
            nnx.Linear, use_bias=False, dot_general=parts.dot_general, rngs=rngs
        )
        self.embedding = linear(BYTES, config.dim, kernel_init=nnx.initializers.normal(1.0))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = parts.RMSNorm(config.dim, rngs=rngs)
        self.logits = linear(config.dim, BYTES, kernel_init=SMALL)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attention) -> jax.Array:
        """int32[B, T] to float32[B, T, 256]."""

        def run(block: Block, x: jax.Array, positions: jax.Array) -> jax.Array:
            return block(x, positions, attend)

        if self.remat:
            # Attention is dear to compute and its result is small, so that is kept: by these names
            # distattn marks what its backward pass needs besides query, key and value.
            names = ("distattn_out", "distattn_lse")
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            run = nnx.remat(run, policy=policy)
        x = self.embedding(jax.nn.one_hot(tokens, BYTES))  # a product, not a gather: it splits
        for block in self.blocks:
            x = run(block, x, positions)
        return self.logits(self.norm(x))


# ------------------------------------------------------------------------ the data


def byte_entropy() -> float:
    """The loss, in nats, of who knows how frequent each byte is and nothing else."""
    share = np.bincount(TEXT, minlength=BYTES) / len(TEXT)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


# ------------------------------------------------------------------------ training


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, wherever that is."""

    config: Config = Config()
    batch: int = 2
    length: int = 1024
    steps: int = 8
    lr: float = 1e-2
    seed: int = 0

    def create(self) -> tuple[Transformer, nnx.Optimizer]:
        """The model with random weights, and AdamW, warmed up at first and cooled down later."""
        model = Transformer(self.config, nnx.Rngs(self.seed))
        warmup = max(self.steps // 10, 1)
        lr = optax.warmup_cosine_decay_schedule(self.lr / 10, self.lr, warmup, self.steps)
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))
        return model, nnx.Optimizer(model, transform, wrt=nnx.Param)

    def read(self, step: int) -> dict[str, np.ndarray]:
        """Windows at random places of the text, and the byte behind each byte, in order.

        They go by the step and by nothing else, so that a run that is resumed reads on. Labels are
        shifted here, where the windows are whole: behind the last byte of a window, and behind the
        last of a device's part of it, comes one that lies elsewhere.
        """
        last = len(TEXT) - self.length - 1
        if last < 0:
            raise ValueError(
                f"length is {self.length}; the text has {len(TEXT)} bytes: ask for fewer"
            )
        random = np.random.default_rng((self.seed, step))
        starts = random.integers(0, last, self.batch, endpoint=True)
        windows = TEXT[starts[:, None] + np.arange(self.length + 1)].astype(np.int32)
        return {"tokens": windows[:, :-1], "labels": windows[:, 1:]}


def mean_loss(model: Transformer, batch: Batch, attend: Attention) -> jax.Array:
    """Mean cross-entropy in nats a byte: a sum over slots, so it needs no order."""
    logits = model(batch["tokens"], batch["positions"], attend)
    return model.parts.mean_loss(logits, jax.nn.one_hot(batch["labels"], BYTES))


def train_step(graphdef: nnx.GraphDef, attend: Attention) -> Callable:
    """The function (state, batch) -> (state, loss), to be compiled."""

    def step(state: nnx.State, batch: Batch) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(graphdef, state)
        loss, gradients = nnx.value_and_grad(mean_loss)(model, batch, attend)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    return step
