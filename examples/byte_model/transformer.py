"""A small byte-level transformer in Flax NNX, the text it reads, and a step of its training.

The model does not know the mesh. Norm, MLP, logits and loss treat each byte alone, so they run unchanged on
a sequence that is sharded over devices, in any order. Only attention combines bytes, and it is an argument:
`attend(query, key, value, positions)`. Another order changes only the positions. They come with the batch,
for the rotary embedding and for the mask.
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

from byte_model import reproducible_layers

BYTES = 256
SMALL = nnx.initializers.normal(0.02)  # so that a byte's embedding outweighs the layers at first
TEXT = np.frombuffer("\n\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Batch = dict[str, jax.Array]  # tokens, labels: int32[B, T]; positions: int32[T]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options of the model."""

    dim: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    remat: bool = False  # compute a block's activations again in the backward pass
    reproducible: bool = False  # bitwise equal on any number of devices, if attention is

    @property
    def operations(self) -> "Operations":
        """Operations of the model besides attention."""
        return REPRODUCIBLE if self.reproducible else FAST


# ------------------------------------------------------------------------ the model


def rotate_pair(
    first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rotate the point (first, second) by an angle."""
    return first * cos - second * sin, second * cos + first * sin


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return nats per byte of logits and labels [B, T, 256]."""
    return optax.softmax_cross_entropy(logits, labels).mean()


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations of the model besides attention."""

    dot_general: Callable = jax.lax.dot_general
    RMSNorm: type[nnx.RMSNorm] = nnx.RMSNorm
    silu: Callable = nnx.silu
    rotate_pair: Callable = rotate_pair
    mean_loss: Callable = mean_cross_entropy


FAST = Operations()
REPRODUCIBLE = Operations(
    **{
        field.name: getattr(reproducible_layers, field.name)
        for field in dataclasses.fields(Operations)
    }
)


def rotate(x: jax.Array, positions: jax.Array, rotate_pair: Callable) -> jax.Array:
    """Apply a rotary embedding: rotate pairs of features by angles proportional to the position.

    The logit of a query and a key then depends on the distance of their positions. Positions are data: a
    token is rotated by its position in the text, on any device and in any slot.
    """
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None]  # [T, 1, H/2]
    cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
    return jnp.concatenate(rotate_pair(*jnp.split(x, 2, axis=-1), cos, sin), axis=-1)


class Block(nnx.Module):
    """Attention with grouped heads, then SwiGLU, each after an RMSNorm and with a residual."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.operations = ops = config.operations
        linear = functools.partial(
            nnx.Linear, use_bias=False, dot_general=ops.dot_general, rngs=rngs
        )
        small = functools.partial(linear, kernel_init=SMALL)
        self.width = config.dim // config.heads
        hidden = 3 * config.dim
        self.attention_norm = ops.RMSNorm(config.dim, rngs=rngs)
        self.query = linear(config.dim, config.heads * self.width)
        self.key = linear(config.dim, config.kv_heads * self.width)
        self.value = linear(config.dim, config.kv_heads * self.width)
        self.attention_out = small(config.heads * self.width, config.dim)
        self.mlp_norm = ops.RMSNorm(config.dim, rngs=rngs)
        self.gate = linear(config.dim, hidden)
        self.up = linear(config.dim, hidden)
        self.down = small(hidden, config.dim)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attention) -> jax.Array:
        """Map [B, T, dim] to [B, T, dim]."""
        y = self.attention_norm(x)
        query, key, value = (
            project(y).reshape(*y.shape[:2], -1, self.width)
            for project in (self.query, self.key, self.value)
        )
        query, key = (rotate(y, positions, self.operations.rotate_pair) for y in (query, key))
        with jax.named_scope("attention"):  # names its collectives in the compiled program
            y = attend(query, key, value, positions)
        x = x + self.attention_out(y.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(self.operations.silu(self.gate(y)) * self.up(y))


class Transformer(nnx.Module):
    """Map bytes to the logits of the next byte of each."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.remat = config.remat
        self.operations = ops = config.operations
        linear = functools.partial(
            nnx.Linear, use_bias=False, dot_general=ops.dot_general, rngs=rngs
        )
        self.embedding = linear(BYTES, config.dim, kernel_init=nnx.initializers.normal(1.0))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = ops.RMSNorm(config.dim, rngs=rngs)
        self.logits = linear(config.dim, BYTES, kernel_init=SMALL)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attention) -> jax.Array:
        """Map int32[B, T] to float32[B, T, 256]."""

        def run(block: Block, x: jax.Array, positions: jax.Array) -> jax.Array:
            return block(x, positions, attend)

        if self.remat:
            # Attention is expensive and its result is small, so the result is kept. distattn gives these
            # names to the arrays that its backward pass needs besides query, key and value.
            names = ("distattn_out", "distattn_lse")
            policy = jax.checkpoint_policies.save_only_these_names(*names)
            run = nnx.remat(run, policy=policy)
        x = self.embedding(
            jax.nn.one_hot(tokens, BYTES)
        )  # a matmul, not a gather: it can be sharded
        for block in self.blocks:
            x = run(block, x, positions)
        return self.logits(self.norm(x))


# ------------------------------------------------------------------------ the data


def byte_entropy() -> float:
    """Return the loss, in nats, of predicting each byte by its frequency in the text."""
    share = np.bincount(TEXT, minlength=BYTES) / len(TEXT)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


# ------------------------------------------------------------------------ training


@dataclasses.dataclass(frozen=True)
class Job:
    """Settings of a training run that do not depend on the mesh."""

    config: Config = Config()
    batch: int = 2
    length: int = 1024
    steps: int = 8
    lr: float = 1e-2
    seed: int = 0

    def create(self) -> tuple[Transformer, nnx.Optimizer]:
        """Return the model with random weights, and AdamW with warm-up and cosine decay."""
        model = Transformer(self.config, nnx.Rngs(self.seed))
        warmup = max(self.steps // 10, 1)
        lr = optax.warmup_cosine_decay_schedule(self.lr / 10, self.lr, warmup, self.steps)
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr))
        return model, nnx.Optimizer(model, transform, wrt=nnx.Param)

    def read(self, step: int) -> dict[str, np.ndarray]:
        """Return random windows of the text, and the next byte of each byte, in order.

        They depend only on the step, so that a resumed run reads the same windows. Labels are shifted here,
        before sharding, because the next byte of a shard's last byte is on another device.
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
    """Return the mean cross-entropy in nats per byte, which does not depend on the order."""
    logits = model(batch["tokens"], batch["positions"], attend)
    return model.operations.mean_loss(logits, jax.nn.one_hot(batch["labels"], BYTES))


def train_step(graphdef: nnx.GraphDef, attend: Attention) -> Callable:
    """Return the function (state, batch) -> (state, loss) to compile."""

    def step(state: nnx.State, batch: Batch) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(graphdef, state)
        loss, gradients = nnx.value_and_grad(mean_loss)(model, batch, attend)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    return step
