"""The ERNIE/BERT encoder: post-norm transformer layers over rows of tokens.

Modules are declarations: a module is its parameters, calling it is pure, noise is an argument, and no noise means no
dropout. They are pytrees, used under plain `jax.jit`, `jax.grad` and `jax.lax.scan`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from ernie_jax import config
from ernie_jax.kernels import LayerNorm, Linear, as_held, feed_forward, summed

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt32


@struct.dataclass
class Rows:
  """Rows of L tokens, each row one text, or several (packed): a token attends within its own text.

  Packed rows come in units, of which an encoder call gets one: what a device encodes at once. `starts` says where the
  unit's texts begin, in its rows laid end to end; text i is segment i + 1. Without `starts`, the texts of each row are
  its segments 1, 2, ...: one, but for masked text. Without tokens, the texts stand in the rows of others (`joined`).
  """

  tokens: Int[Array, "n l"] = struct.field(default=None)
  # Whose token it is: 0 is padding, -s reads text s and is not read ([MASK] augmentation).
  segments: Int[Array, "n l"] = struct.field(default=None)
  positions: Int[Array, "n l"] = struct.field(default=None)  # counted from each text's first token
  types: Int[Array, "n l"] = struct.field(default=None)  # 0, and 1 for the second part of a pair
  starts: Int[Array, "t"] = struct.field(default=None)  # None: segments are counted in each row
  unit: int = struct.field(pytree_node=False, default=0)  # packed: texts of a unit
  longest: int = struct.field(pytree_node=False, default=0)  # packed: tokens that a text may have
  lead: int = struct.field(pytree_node=False, default=1)  # tokens before a text: [CLS], and a marker if there is one


def by_text(x: Shaped[Array, "n l *m"], rows: Rows, longest: int | None = None) -> Shaped[Array, "t k *m"]:
  """What belongs to the first tokens of each text, up to `longest`; after the text's end, whatever stands there."""
  if rows.starts is None:
    return x[:, :longest]
  flat = x.reshape(-1, *x.shape[2:])
  places = rows.starts[:, None] + jnp.arange(rows.longest if longest is None else longest)
  return flat.at[places].get(mode="clip")


def first(x: Shaped[Array, "n l *m"], rows: Rows) -> Shaped[Array, "t *m"]:
  """What belongs to the first token of each text."""
  return by_text(x, rows, 1)[:, 0]


def owned(rows: Rows) -> Int[Array, "t k"]:
  """The tokens of each text: 1; -1 for those that are not read; 0 after the text's end."""
  if rows.starts is None:
    return rows.segments
  segments = by_text(rows.segments, rows)
  # After the last row's end stands its last token again, which may well be this text's.
  there = rows.starts[:, None] + jnp.arange(rows.longest) < rows.tokens.size
  own = jnp.abs(segments) == 1 + jnp.arange(rows.unit)[:, None]
  return jnp.where(there & own, jnp.sign(segments), 0)


def joined(a: Rows, b: Rows) -> Rows:
  """The texts of both, in rows of the same length, and of the same kind; those of `b` may stand in the rows of `a`."""
  if b.tokens is None:  # as segments after those of a
    starts, longest = jnp.concatenate([a.starts, b.starts]), max(a.longest, b.longest)
    return a.replace(starts=starts, unit=a.unit + b.unit, longest=longest)
  both: Any = jax.tree.map(
    lambda x, y: jnp.concatenate([x, y]), a, dataclasses.replace(b, unit=a.unit, longest=a.longest)
  )
  if a.starts is None:
    return both
  return both.replace(
    segments=jnp.concatenate([a.segments, b.segments + a.unit * jnp.sign(b.segments)]),
    starts=jnp.concatenate([a.starts, b.starts + a.tokens.size]),
    unit=a.unit + b.unit,
    longest=max(a.longest, b.longest),
  )


def linear(inputs: int, outputs: int, rngs: nnx.Rngs, dtype: str | None = None, bias: bool = True) -> Linear:
  """BERT's initialisation: normal with standard deviation 0.02, cut at two of them."""
  init = nnx.initializers.truncated_normal(0.02)
  return Linear(inputs, outputs, kernel_init=init, use_bias=bias, dtype=dtype and jnp.dtype(dtype), rngs=rngs)


ROWS = 2**20  # as many rows of several texts a global batch may have, each text with noise of its own


@struct.dataclass
class Noise:
  """Where dropout's randomness comes from: a place in the step (seed), a text's number in the global batch, a token.

  A token's noise depends on nothing else, so it is the same in any chunk, on any device and host, packed or not. JAX's
  own generators number the elements of the array at hand.
  """

  seeds: UInt32[Array, "*site 2"]
  texts: UInt32[Array, "*n"]
  positions: Int[Array, "*#n"]  # of tokens in their texts

  def at(self, seeds: UInt32[Array, "*site 2"]) -> Noise:
    return Noise(seeds, self.texts, self.positions)

  def spread(self, rows: Rows) -> Noise:
    """From texts [t] to the tokens of their rows [n, l]."""
    number = jnp.maximum(jnp.abs(rows.segments) - 1, 0)
    own = rows.starts is None
    texts = self.texts[:, None] + ROWS * number.astype(jnp.uint32) if own else self.texts[number]
    return Noise(self.seeds, texts, rows.positions)


def seeds(key: Key[Array, ""], *shape: int) -> UInt32[Array, "*shape 2"]:
  """Seeds for that many places."""
  return jax.random.bits(key, (*shape, 2), jnp.uint32)


def of_texts(seeds: UInt32[Array, "*site 2"] | None, texts: UInt32[Array, "t"]) -> Noise | None:
  """Noise of whole texts, by their numbers; none without seeds."""
  return None if seeds is None else Noise(seeds, texts, jnp.zeros_like(texts))


def mix(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
  """A 32-bit hash: multiply and xor-shift with the constants of Wellons' "lowbias32", which were searched for."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def drop(x: Float[Array, "*n m"], rate: float, noise: Noise | None) -> Float[Array, "*n m"]:
  """Inverted dropout of tokens; the identity without noise. Kept or not by the hash of text, token and element."""
  if noise is None or rate == 0:
    return x
  element = mix(jax.lax.iota(jnp.uint32, x.shape[-1]) ^ noise.seeds[0])
  return kept(x, rate, element ^ token(noise)[..., None])


def drop_attention(x: Float[Array, "n heads q k"], rate: float, noise: Noise | None) -> Float[Array, "n heads q k"]:
  """Inverted dropout of attention, by the hash of text, reading token, head, and token read."""
  if noise is None or rate == 0:
    return x
  head = jax.lax.iota(jnp.uint32, x.shape[1])[:, None] << 16
  read = mix((noise.positions.astype(jnp.uint32)[:, None, :] | head) ^ noise.seeds[0])
  return kept(x, rate, read[:, :, None, :] ^ token(noise)[:, None, :, None])


def token(noise: Noise) -> UInt32[Array, "*n"]:
  """A hash of each token's text and position."""
  return mix(mix(noise.texts ^ noise.seeds[1]) + noise.positions.astype(jnp.uint32))


def kept(x: Float[Array, "*n"], rate: float, hashes: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
  return jnp.where(mix(hashes) >= jnp.uint32(round(rate * 2**32)), x / (1 - rate), 0)


def attend(
  query: Float[Array, "n q heads d"],
  keyed: Float[Array, "n k heads d"],
  value: Float[Array, "n k heads d"],
  mask: Bool[Array, "n 1 #q k"],
  rate: float,
  noise: Noise | None,
) -> tuple[Float[Array, "n q heads d"], Float[Array, "n heads q k"]]:
  """Attention's output, and its probabilities before dropout, float32 or wider.

  Beside query, key, value and output the gradient keeps nothing where cuDNN computes it (`_by_cudnn`), and else one [n,
  heads, q, k] array: the probabilities in the dtype of `value`, negative where dropout took them. Derived operation by
  operation it keeps up to six. Where that dtype is bfloat16, softmax' gradient takes its mean from the rounded output,
  for an array less: some twice the error of queries and keys where all values have much in common (RESULTS.md), more
  where they have nearly all. Probabilities that nobody reads cost a compiled program nothing; those that are read keep
  what their own gradient needs.
  """
  if rate == 0:
    noise = None
  if _by_cudnn(query, keyed, noise):
    mixed = jax.nn.dot_product_attention(query, keyed, value, mask=mask, implementation="cudnn")
  else:
    mixed = _attend(rate, query, keyed, value, mask, noise)
  return mixed, _attention(query, keyed, mask)


def _by_cudnn(query, keyed, noise):
  """Whether an NVIDIA GPU's library computes it, in one kernel that keeps no probabilities.

  It has dropout, but not by a token's own noise. Of an odd length it has no gradient with a mask. Of a token that reads
  nothing its gradient is wrong, but padding's is 0 before.
  """
  _, length, _, d = query.shape
  usual = length == keyed.shape[1] and length % 2 == 0 and d % 8 == 0 and d <= 128
  return usual and noise is None and query.dtype == jnp.bfloat16 and _has_cudnn()


def _has_cudnn() -> bool:
  """Whether this is for NVIDIA's devices, of the generation (Ampere) that its attention needs, or a later one.

  Asked while tracing, where JAX looks for the library: elsewhere it cannot even be one of `platform_dependent`'s ways.
  """
  local, meant = jax.local_devices()[0], jax.sharding.get_abstract_mesh().abstract_device
  if (local if meant is None else meant).platform not in ("gpu", "cuda"):
    return False
  if local.platform != "gpu":  # compiled for a GPU elsewhere
    return True
  capability = local.compute_capability  # "9.0"; of AMD's: "gfx90a"
  return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8


def _attention(query, keyed, mask):
  logits = summed("nqad,nkad->naqk", "float32", query, keyed)
  return jax.nn.softmax(jnp.where(mask, logits * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rate, query, keyed, value, mask, noise):
  return _attend_forward(rate, query, keyed, value, mask, noise)[0]


def _attend_forward(rate, query, keyed, value, mask, noise):
  signed = attention = _attention(query, keyed, mask)
  if noise is not None:
    signed = jnp.where(drop_attention(attention, rate, noise) > 0, attention, -attention)
  signed = as_held(signed.astype(value.dtype))
  mixed = summed("naqk,nkad->nqad", "float32", _left(signed, noise), value)
  mixed = _raised(mixed, rate, noise).astype(value.dtype)
  return mixed, (query, keyed, value, mask, signed, mixed, noise)


def _left(signed, noise):
  """Probabilities that dropout left, not yet raised by 1 / (1 - rate)."""
  return signed if noise is None else jnp.maximum(signed, 0)


def _raised(x, rate, noise):
  return x if noise is None else x / (1 - rate)


def _attend_backward(rate, held, slope):
  query, keyed, value, mask, signed, mixed, noise = held
  # The mean of `inner`, each key by its probability, so that it needs no array of its own.
  mean = _by_head(slope.astype(jnp.promote_types(slope.dtype, jnp.float32)) * mixed)[..., None]
  of_value = summed("naqk,nqad->nkad", "float32", _left(signed, noise), slope)
  of_value = _raised(of_value, rate, noise).astype(value.dtype)
  inner = summed("nqad,nkad->naqk", "float32", slope, value)
  inner = inner if noise is None else jnp.where(signed > 0, _raised(inner, rate, noise), 0)
  # Where nothing is read, as by padding, all probabilities are alike, whatever the logits.
  scale = jnp.where(mask.any(-1, keepdims=True), query.shape[-1] ** -0.5, 0)
  of_logits = as_held((jnp.abs(signed) * (inner - mean) * scale).astype(value.dtype))
  of_query = jnp.einsum("naqk,nkad->nqad", of_logits, keyed)
  of_keyed = jnp.einsum("naqk,nqad->nkad", of_logits, query)
  return of_query, of_keyed, of_value, None, None


def _by_head(x):
  """[n, q, a, d] -> [n, a, q], summed over d: by a product, which a TPU makes without moving `x` to another layout."""
  heads, d = x.shape[2:]
  own = jnp.repeat(jnp.eye(heads, dtype=x.dtype), d, axis=0)
  flat = x.reshape(*x.shape[:2], heads * d)
  return jnp.einsum("nqh,ha->nqa", flat, own, precision=jax.lax.Precision.HIGHEST).swapaxes(1, 2)


_attend.defvjp(_attend_forward, _attend_backward)


class Layer(nnx.Module):
  """Self-attention, then a feed-forward network, each followed by dropout, residual sum and LayerNorm."""

  def __init__(self, a: config.Architecture, dtype: str, key: Key[Array, ""]):
    rngs = nnx.Rngs(key)
    self.query, self.key, self.value, self.output = (linear(a.width, a.width, rngs, dtype) for _ in range(4))
    self.attention_norm, self.output_norm = norm(a, rngs), norm(a, rngs)
    self.up, self.down = linear(a.width, a.inner, rngs, dtype), linear(a.inner, a.width, rngs, dtype)
    self.architecture = a

  def __call__(
    self, x: Float[Array, "n l h"], mask: Bool[Array, "n 1 l l"], noise: Noise | None, leads: Rows | None = None
  ) -> tuple[Float[Array, "n q h"], Float[Array, "n heads q l"]]:
    """The layer's output, and its attention probabilities (before dropout, float32).

    Given rows (and no noise), only for the first token of each of their texts, [T, 1, H]: the rest is not computed.
    """
    a = self.architecture
    noises = (None,) * 3 if noise is None else [noise.at(noise.seeds[i]) for i in range(3)]
    heads = lambda y: y.reshape(*y.shape[:2], a.heads, a.width // a.heads)
    # The tokens of packed texts are gathered one by one: better as they are.
    how: Any = None if leads is not None and leads.starts is not None else "written"
    keyed, value = heads(self.key(x, how)), heads(self.value(x, how))
    if leads is not None:
      x, keyed, value = first(x, leads)[:, None], by_text(keyed, leads), by_text(value, leads)
      mask = (owned(leads) > 0)[:, None, None, :]
    query = heads(self.query(x, how))
    mixed, attention = attend(query, keyed, value, mask, a.attention_dropout, noises[0])
    x = self.attention_norm(x + drop(self.output(mixed.reshape(x.shape), "read"), a.dropout, noises[1])).astype(x.dtype)
    inner = feed_forward(x, self.up, self.down, a.activation)
    return self.output_norm(x + drop(inner, a.dropout, noises[2])).astype(x.dtype), attention


def norm(a: config.Architecture, rngs: nnx.Rngs) -> LayerNorm:
  return LayerNorm(a.width, epsilon=a.epsilon, rngs=rngs)


class Encoder(nnx.Module):
  """Word, position, type (and ERNIE's task) embeddings, then the layers: stacked parameters, or a list of them."""

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
    self.layers: Any = jax.vmap(lambda k: Layer(a, config.PRODUCTS[dtype], k))(jax.random.split(layers, a.layers))
    self.architecture, self.dtype, self.scan, self.remat = a, config.STREAM[dtype], scan, remat

  def __call__(
    self, rows: Rows, noise: Noise | None = None, *, leads: bool = False, every: bool = False
  ) -> tuple[Float[Array, "*every n l h"], Float[Array, "*every n q l"]]:
    """Hidden states of the last layer, and its attention probabilities, averaged over heads; dropout where there is
    noise.

    With `leads` and no noise, the last layer computes the first token of each text only, [T, 1, H]. With `every`, both
    are those of all layers, [layers, N, L, ...].

    Noise brings seeds [layers + 1, 3, 2], as from `seeds(key, layers + 1, 3)`, and a number for each text.
    Cost follows use: attention probabilities that nobody reads are removed by the compiler.
    """
    a = self.architecture
    noise = None if noise is None else noise.spread(rows)
    x = self.word(rows.tokens) + self.position(rows.positions) + self.type(rows.types)
    if self.task is not None:
      x = x + self.task(jnp.zeros_like(rows.tokens))
    embedding = None if noise is None else noise.at(noise.seeds[-1, 0])
    x = drop(self.norm(x), a.dropout, embedding).astype(self.dtype)
    same = jnp.abs(rows.segments)[:, :, None] == rows.segments[:, None, :]
    mask = (same & (rows.segments > 0)[:, None, :])[:, None]

    def apply(x, layer_and_seeds, leads=None):
      layer, own = layer_and_seeds
      x, attention = layer(x, mask, None if noise is None else noise.at(own), leads)
      return x, attention.mean(1)

    # The last layer stands apart because its attention is an output (distilled by kl_attention).
    own = None if noise is None else noise.seeds[:-1]
    if isinstance(self.layers, nnx.List):
      *body, last = [(layer, None if own is None else own[i]) for i, layer in enumerate(self.layers)]
    else:
      body, last = split_last((self.layers, own), a.layers)
      body = body if self.scan and a.layers > 1 else unstack(body, a.layers - 1)
    step = lambda x, layer_and_seeds: (found := apply(x, layer_and_seeds), (found[0], found if every else None))[1]
    step = jax.checkpoint(step, prevent_cse=isinstance(body, list)) if self.remat else step
    made: list[Any] = []
    if isinstance(body, list):
      for one in body:
        x, found = step(x, one)
        made.append(found)
      below = jax.tree.map(lambda *x: jnp.stack(x), *made) if made else None
    else:
      x, below = jax.lax.scan(step, x, body)
    top = apply(x, last, rows if leads and noise is None else None)
    if not every or below is None:
      return jax.tree.map(lambda x: x[None], top) if every else top
    return jax.tree.map(lambda below, top: jnp.concatenate([below, top[None]]), below, top)


def encoders(module: Any) -> list[Encoder]:
  """Those of a student or a teacher."""
  return [e for name in ("encoder", "query_encoder") if (e := getattr(module, name, None)) is not None]


def apart(module: Any) -> Any:
  """A student or a teacher whose encoders hold each layer's parameters as arrays of their own, out of any program.

  A compiled program cuts a stack into layers in each call, which on a CPU copies all parameters. Elsewhere, where that
  takes no time beside the rest, the module is given back as it is.
  """
  if jax.default_backend() != "cpu" or all(isinstance(encoder.layers, nnx.List) for encoder in encoders(module)):
    return module

  def cut(stack, size):
    held = jax.tree.map(np.asarray, stack)
    return [jax.tree.map(lambda x: x[i], held) for i in range(size)]

  return unrolled(module, cut)


def unrolled(module: Any, cut: Callable[[Any, int], list] | None = None) -> Any:
  """A student whose encoders' layers stand one by one, in a program that calls them several times and has no loops.

  Cut once, and not in each call, so that the calls' gradients are summed by layer, in the products that make them, and
  not as stacks. `cut` gives the layers of a stack of so many; None: `unstack`.
  """
  module = jax.tree.map(lambda x: x, module)  # a copy
  for encoder in encoders(module):
    encoder.layers = nnx.List((cut or unstack)(encoder.layers, encoder.architecture.layers))
  return module


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
