"""What is to be computed: one step of a model's attention, over all of its layers."""

import dataclasses
import math

from distattn.cost import Shape


@dataclasses.dataclass(frozen=True)
class Workload:
    """The attention of one step: a token decoded, a prompt read, or forward and backward of training.

    Args:
      context: keys of a sequence, over all devices.
      queries: of a sequence: 1 for decoding, `context` for a prompt or training.
      batch: sequences.
      heads: of the query.
      kv_heads: of key and value; `heads` is a multiple.
      head_dim: of query and key.
      value_dim: of value; None: head_dim.
      layers: of the model.
      dtype_bytes: of an item of query, key and value.
      training: the backward pass too.
      causal: each query attends to its own key and those before it, as in a language model; the queries
        are the last of the sequence. Keys are supposed to lie so that all devices have the same work, as
        `layouts.zigzag` has them. With T = S that is half of the products, and of one query it is all.
    """

    context: int
    queries: int = 1
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    value_dim: int | None = None
    layers: int = 1
    dtype_bytes: int = 2
    training: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        """Check the sizes."""
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name in ("training", "causal") or size is None:
                continue
            if not (size == int(size) and size >= 1):
                raise ValueError(
                    f"{field.name} is {size!r}; it must be a whole number, 1 or more: pass what one "
                    "step has"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads} and kv_heads is {self.kv_heads}; heads must be a multiple: pass "
                "the heads of the whole model, not of a device"
            )

    @property
    def values(self) -> int:
        """V."""
        return self.value_dim or self.head_dim

    @property
    def shape(self) -> Shape:
        """Of the call of one layer."""
        return Shape(
            batch=self.batch,
            query_length=self.queries,
            key_length=self.context,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.values,
            itemsize=self.dtype_bytes,
            causal=self.causal,
        )

    def of_group(self, batch: int, heads: int) -> "Workload":
        """What is left for each group of devices where so many divide sequences, and so many heads.

        Where heads of key and value do not divide, they are repeated until they do, as in a call.
        """
        return dataclasses.replace(
            self,
            batch=self.batch // batch,
            heads=self.heads // heads,
            kv_heads=math.lcm(self.kv_heads, heads) // heads,
        )

    def with_context(self, context: int) -> "Workload":
        """The same over another context; where there are as many queries, those change with it."""
        queries = context if self.queries == self.context > 1 else self.queries
        return dataclasses.replace(self, context=context, queries=queries)
