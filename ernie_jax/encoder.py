"""The ERNIE/BERT encoder: post-norm transformer layers over rows of tokens.

Modules are declarations: a module is its parameters, calling it is pure, a key is an argument, and no key means no
dropout. They are pytrees, used under plain `jax.jit`, `jax.grad` and `jax.lax.scan`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx, struct

from ernie_jax import config

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, Key


@struct.dataclass
class Rows:
  """Rows of L tokens. Several texts may share a row: tokens attend within their own segment; segment 0 is padding."""

  tokens: Int[Array, "n l"]
  segments: Int[Array, "n l"]
  positions: Int[Array, "n l"]  # counted from each text's first token
  types: Int[Array, "n l"]  # 0, and 1 for the second part of a pair


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, dtype: str | None = None, bias: bool = True) -> nnx.Linear:
  """BERT's initialisation: normal with standard deviation 0.02, cut at two of them."""
  init = nnx.initializers.truncated_normal(0.02)
  return nnx.Linear(inputs, outputs, kernel_init=init, use_bias=bias, dtype=dtype and jnp.dtype(dtype), rngs=rngs)


def drop(x: Float[Array, ...], rate: float, key: Key[Array, ""] | None) -> Float[Array, ...]:
  """Inverted dropout; the identity without a key."""
  if key is None or rate == 0:
    return x
  return nnx.Dropout(rate)(x, deterministic=False, rngs=key)


class Layer(nnx.Module):
  """Self-attention, then a feed-forward network, each followed by dropout, residual sum and LayerNorm."""

  def __init__(self, a: config.Architecture, dtype: str, key: Key[Array, ""]):
    rngs = nnx.Rngs(key)
    self.query, self.key, self.value, self.output = (linear(a.width, a.width, rngs, dtype) for _ in range(4))
    self.attention_norm, self.output_norm = norm(a, rngs), norm(a, rngs)
    self.up, self.down = linear(a.width, a.inner, rngs, dtype), linear(a.inner, a.width, rngs, dtype)
    self.architecture = a

  def __call__(
    self, x: Float[Array, "n l h"], mask: Bool[Array, "n 1 l l"], key: Key[Array, ""] | None
  ) -> tuple[Float[Array, "n l h"], Float[Array, "n heads l l"]]:
    """The layer's output, and its attention probabilities (before dropout, float32)."""
    a = self.architecture
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    heads = lambda y: y.reshape(*y.shape[:2], a.heads, a.width // a.heads)
    query, keyed, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
    logits = jnp.einsum("nqad,nkad->naqk", query, keyed, preferred_element_type=jnp.float32)
    logits = jnp.where(mask, logits * (a.width // a.heads) ** -0.5, jnp.finfo(jnp.float32).min)
    attention = jax.nn.softmax(logits, axis=-1)
    mixed = jnp.einsum("naqk,nkad->nqad", drop(attention, a.attention_dropout, keys[0]).astype(value.dtype), value)
    x = self.attention_norm(x + drop(self.output(mixed.reshape(x.shape)), a.dropout, keys[1])).astype(x.dtype)
    activation = {"gelu": lambda y: jax.nn.gelu(y, approximate=False), "relu": jax.nn.relu}[a.activation]
    inner = self.down(activation(self.up(x)))
    return self.output_norm(x + drop(inner, a.dropout, keys[2])).astype(x.dtype), attention


def norm(a: config.Architecture, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """LayerNorm in float32, with the variance computed from differences: E[x^2] - E[x]^2 loses digits."""
  return nnx.LayerNorm(a.width, epsilon=a.epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


class Encoder(nnx.Module):
  """Word, position, type (and ERNIE's task) embeddings, then the layers, whose parameters are stacked."""

  def __init__(
    self,
    a: config.Architecture,
    key: Key[Array, ""],
    *,
    dtype: str = "float32",
    scan: bool = True,
    remat: bool = False,
  ):
    words, layers = jax.random.split(key)
    rngs = nnx.Rngs(words)
    init = nnx.initializers.truncated_normal(0.02)
    embed = lambda rows: nnx.Embed(rows, a.width, embedding_init=init, rngs=rngs)
    self.word, self.position, self.type = embed(a.vocabulary), embed(a.positions), embed(a.types)
    self.task = embed(a.tasks) if a.tasks else None
    self.norm = norm(a, rngs)
    self.layers = jax.vmap(lambda k: Layer(a, dtype, k))(jax.random.split(layers, a.layers))
    self.architecture, self.dtype, self.scan, self.remat = a, dtype, scan, remat

  def __call__(
    self, rows: Rows, key: Key[Array, ""] | None = None
  ) -> tuple[Float[Array, "n l h"], Float[Array, "n heads l l"]]:
    """Hidden states of the last layer, and the last layer's attention probabilities.

    Cost follows use: attention probabilities that nobody reads are removed by the compiler.
    """
    a = self.architecture
    keys = jnp.zeros(a.layers + 1) if key is None else jax.random.split(key, a.layers + 1)
    spec = jax.typeof(rows.tokens).sharding.spec
    look = lambda table, ids: table(ids, out_sharding=spec)
    x = look(self.word, rows.tokens) + look(self.position, rows.positions) + look(self.type, rows.types)
    if self.task is not None:
      x = x + look(self.task, jnp.zeros_like(rows.tokens))
    x = drop(self.norm(x), a.dropout, None if key is None else keys[-1]).astype(self.dtype)
    same = rows.segments[:, :, None] == rows.segments[:, None, :]
    mask = (same & (rows.segments > 0)[:, None, :])[:, None]

    def apply(x, layer_and_key):
      layer, k = layer_and_key
      return layer(x, mask, None if key is None else k)

    # The last layer stands apart because its attention is an output (distilled by kl_attention).
    body, last = split_last((self.layers, keys[:-1]), a.layers)
    step = lambda x, layer_and_key: (apply(x, layer_and_key)[0], None)
    step = jax.checkpoint(step, prevent_cse=not self.scan) if self.remat else step
    if self.scan and a.layers > 1:
      x, _ = jax.lax.scan(step, x, body)
    else:
      for one in unstack(body, a.layers - 1):
        x, _ = step(x, one)
    return apply(x, last)


def split_last(stack, size: int):
  """Arrays [size, ...] -> (arrays [size - 1, ...], arrays [...] of the last)."""
  leaves, tree = jax.tree.flatten(stack)
  parts = [jax.lax.split(x, (size - 1, 1)) for x in leaves]
  return jax.tree.unflatten(tree, [p[0] for p in parts]), jax.tree.unflatten(tree, [p[1][0] for p in parts])


def unstack(stack, size: int) -> list:
  """Arrays [size, ...] -> size trees of arrays [...]. `lax.split`'s gradient is one concatenation, not size sums."""
  if size == 0:
    return []
  leaves, tree = jax.tree.flatten(stack)
  parts = [jax.lax.split(x, (1,) * size) for x in leaves]
  return [jax.tree.unflatten(tree, [p[i][0] for p in parts]) for i in range(size)]


def with_dropout(a: config.Architecture, rate: float | None) -> config.Architecture:
  """The architecture with both dropout rates set to `rate`; None keeps the checkpoint's."""
  return a if rate is None else dataclasses.replace(a, dropout=rate, attention_dropout=rate)
