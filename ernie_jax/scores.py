"""The three scorers as pure functions of (params, batch, key), and all the scores that a loss asks for.

dual-encoder      s_de(q, p) = <h(q), h(p)>                       one vector a text
late interaction  s_li(q, p) = sum_i max_j <e_i(q), e_j(p)>       one vector a token, the same forward pass
cross-encoder     s_ce(q, p) = w . dropout(tanh(W h_cls([q; p]))) + b
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from ernie_jax import config, mesh
from ernie_jax.encoder import (
  Encoder,
  Noise,
  Rows,
  by_text,
  drop,
  first,
  joined,
  linear,
  norm,
  of_texts,
  owned,
  seeds,
  unrolled,
  with_dropout,
)
from ernie_jax.kernels import ACTIVATIONS

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, Key, UInt32

Params = dict  # {"student": Student, "teacher": Teacher}; in post-training "masked": Masked besides


@struct.dataclass
class MaskedRows:
  """B rows of masked text, several texts a row, and what stood at M masked places of each row."""

  rows: Rows
  places: Int[Array, "b m"]
  tokens: Int[Array, "b m"]  # the original ones; -1: no place, where a row has fewer


@struct.dataclass
class Batch:
  """B queries, each with its own list of K passages: the positive at index 0, then hard negatives; B masked rows."""

  # B texts; None, as all the others, where no term asks for it. Packed, where one encoder reads both, they stand in the
  # rows of the passages: beside long ones there is room.
  queries: Rows = struct.field(default=None)
  passages: Rows = struct.field(default=None)  # B*K texts, query by query
  pairs: Rows = struct.field(default=None)  # B*K texts [CLS] query [SEP] passage [SEP], of the same tokens
  # Identity of each passage's text: equal texts have equal numbers.
  texts: Int[Array, "bk"] = struct.field(default=None)
  # Text numbers of the query's known positives, padded with -1.
  known: Int[Array, "b m"] = struct.field(default=None)
  masked: MaskedRows = struct.field(default=None)


@struct.dataclass
class Scores:
  """What the loss terms compare; None where no term asks. Own lists hold the positive at index 0.

  Pools hold it there too: column 0 is the own positive, then every passage of the global batch, with -inf where the
  passage is a known positive of the query (its own among them), which is never a negative.
  """

  cross: Float[Array, "b k"] = struct.field(default=None)
  dual: Float[Array, "b k"] = struct.field(default=None)
  dual_pool: Float[Array, "b c"] = struct.field(default=None)
  late: Float[Array, "b k"] = struct.field(default=None)
  late_pool: Float[Array, "b c"] = struct.field(default=None)
  twins: tuple[Float[Array, "b p"], Float[Array, "b p"]] = struct.field(
    default=None
  )  # two dropout passes; known positives are there too
  attention: Float[Array, "b k lq lp"] = struct.field(default=None)  # the cross-encoder's, query token to passage token
  attentions: Float[Array, "b k m lq lp"] = struct.field(default=None)  # the same of m layers (VIRT), and the student's
  products: Float[Array, "b k m lq lp"] = struct.field(default=None)  # <h_i, h_j> of its hidden states
  matches: Float[Array, "b k lq lp"] = struct.field(default=None)  # late interaction's <e_i, e_j>
  query_content: Bool[Array, "b lq"] = struct.field(default=None)  # tokens that are neither special nor padding
  passage_content: Bool[Array, "b k lp"] = struct.field(default=None)
  masked: Float[Array, "b m"] = struct.field(default=None)  # -log p of what stood at masked places
  masked_there: Bool[Array, "b m"] = struct.field(default=None)  # which of them are places


class Student(nnx.Module):
  """One encoder for dual-encoder and late interaction (a second one for queries if not tied)."""

  def __init__(self, a: config.Architecture, model: config.Model, key: Key[Array, ""]):
    a = with_dropout(a, model.dropout)
    keys = jax.random.split(key, 3)
    encoder = lambda k: Encoder(a, k, dtype=model.dtype, scan=model.scan, remat=model.remat)
    self.encoder = encoder(keys[0])
    self.query_encoder = None if model.tied else encoder(keys[0])
    self.projection = linear(a.width, model.late_width, nnx.Rngs(keys[2]), bias=False) if model.late_width else None
    self.reduction = linear(a.width, model.dual_width, nnx.Rngs(keys[1])) if model.dual_width else None


class Teacher(nnx.Module):
  """The cross-encoder; without an encoder of its own when it shares the student's."""

  def __init__(self, a: config.Architecture, model: config.Model, key: Key[Array, ""]):
    a = with_dropout(a, model.dropout)
    keys = jax.random.split(key, 2)
    rngs = nnx.Rngs(keys[1])
    own = not model.share_encoder
    self.encoder = Encoder(a, keys[0], dtype=model.dtype, scan=model.scan, remat=model.remat) if own else None
    self.pooler = linear(a.width, a.width, rngs) if model.teacher_pooler else None
    self.head = linear(a.width, 1, rngs)


class Masked(nnx.Module):
  """BERT's head of masked language modelling: H -> H, activation, LayerNorm; then the encoder's own word embeddings."""

  def __init__(self, a: config.Architecture, key: Key[Array, ""]):
    rngs = nnx.Rngs(key)
    self.dense, self.norm = linear(a.width, a.width, rngs), norm(a, rngs)
    self.bias = nnx.Param(jnp.zeros(a.vocabulary))

  def __call__(self, hidden: Float[Array, "b m h"], encoder: Encoder) -> Float[Array, "b m v"]:
    """Logits of every word of the vocabulary, float32; the products with them in the encoder's dtype."""
    x = self.norm(ACTIVATIONS[encoder.architecture.activation](self.dense(hidden.astype(jnp.float32))))
    words = encoder.word.embedding[...].astype(encoder.dtype)
    logits = jnp.einsum("bmh,vh->bmv", x.astype(encoder.dtype), words, preferred_element_type=jnp.float32)
    return logits + self.bias[...]


def masked(params: Params, own: MaskedRows, noise: Noise | None) -> Float[Array, "b m"]:
  """-log p of the token that stood at each masked place; 0 where there is none.

  Logits are made at the masked places alone.
  """
  encoder = params["student"].encoder
  hidden, _ = encoder(own.rows, noise)
  logits = params["masked"](jnp.take_along_axis(hidden, own.places[..., None], axis=1), encoder)
  stood = jnp.take_along_axis(logits, jnp.maximum(own.tokens, 0)[..., None], axis=-1)[..., 0]
  return jnp.where(own.tokens >= 0, jax.nn.logsumexp(logits, axis=-1) - stood, 0)


@struct.dataclass
class Embeddings:
  """What one student pass makes of N texts of at most L tokens."""

  vector: Float[Array, "n h"]  # or as wide as `model.dual_width`
  mask: Bool[Array, "n l"]
  content: Bool[Array, "n l"]  # tokens that are neither padding nor special
  tokens: Float[Array, "n l d"] = struct.field(default=None)  # unit length, in the model's dtype
  twin: Float[Array, "n h"] = struct.field(default=None)  # the vector again, under other dropout (DualReg)
  hidden: Float[Array, "n l m h"] = struct.field(default=None)  # after each layer, in the model's dtype (VIRT)

  def of(self, texts: slice, longest: int | None) -> Embeddings:
    """Those of some texts, of so many tokens at most."""
    vector, twin = jax.tree.map(lambda x: x[texts], (self.vector, self.twin))
    by_token = self.mask, self.content, self.tokens, self.hidden
    mask, content, tokens, hidden = jax.tree.map(lambda x: x[texts, :longest], by_token)
    return Embeddings(vector, mask, content, tokens, twin, hidden)


def repeated(rows: Rows, noise: Noise | None, copies: int) -> tuple[Rows, Noise | None]:
  """The texts once, or twice, each time under noise of their own."""
  if copies == 1:
    return rows, noise
  if noise is not None:
    texts = jnp.concatenate([noise.texts * copies + i for i in range(copies)])
    noise = of_texts(noise.seeds, texts)
  return joined(rows, rows), noise


def embed(
  student: Student,
  model: config.Model,
  rows: Rows,
  noise: Noise | None,
  query: bool,
  *,
  late: bool = True,
  copies: int = 1,
  every: bool = False,
) -> Embeddings:
  """Dual-encoder vectors (float32) and late-interaction token vectors from one forward pass; hidden states, if `every`.

  With `copies=2` every text goes through the same pass twice, the second time under noise of its own, for the twin.
  """
  encoder = student.query_encoder if query and student.query_encoder is not None else student.encoder
  several, numbers = repeated(rows, noise, copies)
  alone = model.pooling == "cls" and not late and noise is None and not every
  hidden, _ = encoder(several, numbers, leads=alone, every=every)
  return embeddings(student, model, rows, several, hidden, alone=alone, late=late, copies=copies, every=every)


def embed_both(
  student: Student,
  model: config.Model,
  rows: tuple[Rows, Rows],
  seeds: UInt32[Array, "site 3 2"] | None,
  numbers: tuple[UInt32[Array, "b"], UInt32[Array, "bk"]],
  **settings: Any,
) -> tuple[Embeddings, Embeddings]:
  """`embed` of queries and of passages: in one pass where one encoder reads both and their rows are alike.

  `numbers` tell their texts' noise apart; without seeds there is none. All tokens are computed in the last layer too.
  """
  noise = partial(of_texts, seeds)
  queries, passages = rows
  beside, apart = queries.tokens is None, student.query_encoder is not None
  if beside and apart:
    raise ValueError(
      "packed queries stand in the rows of passages, but have an encoder of their own: a layout not tied"
    )
  if apart or not (beside or queries.tokens.shape[1] == passages.tokens.shape[1]):
    q, p = (embed(student, model, *one, **settings) for one in zip(rows, map(noise, numbers), (True, False)))
    return q, p
  both = joined(passages, queries)
  several, several_noise = repeated(both, noise(jnp.concatenate(numbers[::-1])), settings["copies"])
  hidden, _ = student.encoder(several, several_noise, every=settings["every"])
  made = embeddings(student, model, both, several, hidden, **settings)
  count = len(numbers[1])
  return made.of(slice(count, None), queries.longest or None), made.of(slice(count), passages.longest or None)


def embeddings(
  student: Student,
  model: config.Model,
  rows: Rows,
  several: Rows,
  hidden: Float[Array, "*every n l h"],
  *,
  alone: bool = False,
  late: bool,
  copies: int,
  every: bool,
) -> Embeddings:
  """What hidden states of `several`, the `repeated` rows, say of the texts; `alone`: they are of first tokens only."""
  dtype, special = student.encoder.dtype, jnp.array(student.encoder.architecture.special or (-1,))
  layers: Any = None
  if every:
    layers = by_text(jnp.moveaxis(hidden[:, : len(rows.tokens)], 0, 2), rows)
    hidden = hidden[-1]
  if alone:
    vector = hidden[:, 0].astype(jnp.float32)
  elif model.pooling == "mean":
    read = (owned(several) > 0)[..., None]
    vector = jnp.where(read, by_text(hidden, several).astype(jnp.float32), 0).sum(1) / read.sum(1)
  else:
    vector = first(hidden, several).astype(jnp.float32)
  if student.reduction is not None:
    vector = student.reduction(vector)
  vectors = jnp.split(unit(vector) if model.cosine else vector, copies)
  tokens: Any = None
  if late:
    one = hidden[: len(rows.tokens)].astype(jnp.float32)
    tokens = by_text(unit(one if student.projection is None else student.projection(one)).astype(dtype), rows)
  twin: Any = vectors[1] if copies > 1 else None
  mask = owned(rows) != 0
  return Embeddings(vectors[0], mask, mask & ~jnp.isin(by_text(rows.tokens, rows), special), tokens, twin, layers)


def dual_width(student: Student) -> int:
  """How wide a dual-encoder vector is."""
  return student.encoder.architecture.width if student.reduction is None else student.reduction.out_features


def late_width(student: Student) -> int:
  """D: how wide a token vector is."""
  return student.encoder.architecture.width if student.projection is None else student.projection.out_features


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """x / |x|, with a finite gradient at 0."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def cross(
  params: Params, rows: Rows, noise: Noise | None, *, leads: bool = False, every: bool = False
) -> tuple[Float[Array, "t"], Float[Array, "*every n q l"]]:
  """The cross-encoder's logit of each joined pair, and its last layer's attention in the rows, averaged over heads.

  Noise brings one place more than the encoder's, for the head. With `leads` (and no noise) the attention is that of the
  first tokens alone; with `every` that of all layers, [layers, N, L, L].
  """
  teacher: Teacher = params["teacher"]
  encoder = params["student"].encoder if teacher.encoder is None else teacher.encoder
  inner, outer = (None, None) if noise is None else (noise.at(noise.seeds[:-1]), noise.at(noise.seeds[-1, 0]))
  hidden, attention = encoder(rows, inner, leads=leads, every=every)
  hidden = hidden[-1] if every else hidden
  one = (hidden[:, 0] if leads and noise is None else first(hidden, rows)).astype(jnp.float32)
  if teacher.pooler is not None:
    one = jnp.tanh(teacher.pooler(one))
  return teacher.head(drop(one, encoder.architecture.dropout, outer))[:, 0], attention


def matches(q: Embeddings, p: Float[Array, "b k lp d"]) -> Float[Array, "b k lq lp"]:
  """<e_i(q), e_j(p)> of each query with its own list."""
  return jnp.einsum("bqd,bkpd->bkqp", q.tokens, p, preferred_element_type=jnp.float32)


def maxsim(
  similarity: Float[Array, "*n lq lp"], query_mask: Bool[Array, "*#n lq"], passage_mask: Bool[Array, "*#n lp"]
) -> Float[Array, "*n"]:
  """sum_i max_j similarity[i, j]: masked passage tokens are -inf before the maximum, masked query tokens add 0."""
  best = jnp.where(passage_mask[..., None, :], similarity, -jnp.inf).max(-1)
  return jnp.where(query_mask, best, 0).sum(-1)


@jax.custom_vjp
def maxsim_of_all(
  q: Float[Array, "b lq d"],
  p: Float[Array, "c lp d"],
  query_mask: Bool[Array, "b lq"],
  passage_mask: Bool[Array, "c lp"],
) -> Float[Array, "c b"]:
  """`maxsim` of every query (float32, of products rounded to the dtype of `p`) with every passage.

  The gradient goes to every passage token that is the best. JAX's own shares it among equals, for which it reads all
  similarities twice more.
  """
  return _maxsim_forward(q, p, query_mask, passage_mask)[0]


def _similarities(q, p, passage_mask):
  """[c, lp, b, lq]: with query tokens innermost the largest is found element by element."""
  found = jnp.einsum("cpd,bqd->cpbq", p, q.astype(p.dtype), preferred_element_type=jnp.float32)
  return jnp.where(passage_mask[:, :, None, None], found, -jnp.inf)


def _maxsim_forward(q, p, query_mask, passage_mask):
  best = _similarities(q, p, passage_mask).max(1)
  return jnp.where(query_mask, best, 0).sum(-1), (q, p, query_mask, passage_mask, best)


def _maxsim_backward(kept, slope):
  q, p, query_mask, passage_mask, best = kept
  taken = (_similarities(q, p, passage_mask) == best[:, None]) & query_mask
  share = jnp.where(taken, slope[:, None, :, None], 0).astype(p.dtype)
  of_q = jnp.einsum("cpbq,cpd->bqd", share, p, preferred_element_type=jnp.float32)
  of_p = jnp.einsum("cpbq,bqd->cpd", share, q.astype(p.dtype), preferred_element_type=jnp.float32)
  return of_q.astype(q.dtype), of_p.astype(p.dtype), None, None


maxsim_of_all.defvjp(_maxsim_forward, _maxsim_backward)


TILE = 2**24  # token-to-token similarities that MaxSim over the pool holds at once, on each device


def maxsim_pool(q: Embeddings, p: Embeddings) -> Float[Array, "b p"]:
  """Late-interaction scores of every query with every passage of the global batch, some passages at a time.

  Every turn gathers a few passages of each device. No [B, P, Lq, Lp] tensor exists and no device holds all token
  vectors: gather and similarities are made again in the backward pass.
  """

  def local(_, q: Embeddings, p: Embeddings):
    devices, queries, passages = mesh.size(), len(q.mask), len(p.mask)
    each = queries * devices * q.mask.shape[1] * p.mask.shape[1]  # similarities for one passage of every device
    turn = largest_part(passages, max(TILE // each, 1))

    wide = q.tokens.astype(jnp.float32)  # so that its gradient is summed over the turns in float32

    @jax.checkpoint
    def one(own):
      tokens, mask = jax.tree.map(mesh.replicate, own)
      return maxsim_of_all(wide, tokens, q.mask, mask)

    turns = jax.tree.map(lambda x: x.reshape(-1, turn, *x.shape[1:]), (p.tokens, p.mask))
    found = jax.lax.map(one, turns).reshape(-1, devices, turn, queries)
    return found.transpose(3, 1, 0, 2).reshape(queries, devices * passages)

  return mesh.per_device(local, (), q, p)


def pool(own: Float[Array, "b k"], scores: Float[Array, "b p"], known: Bool[Array, "b p"]) -> Float[Array, "b c"]:
  """The own positive, then every passage of the pool that is not a known positive of the query (C = 1 + P)."""
  return jnp.concatenate([own[:, :1], jnp.where(known, -jnp.inf, scores)], axis=1)


def pair_attention(
  attention: Float[Array, "n l l"], pairs: Rows, passages: Rows, query_length: int
) -> Float[Array, "t lq lp"]:
  """Cuts the query-to-passage block out of joined pairs' attention, token by token as the student reads both.

  In [CLS] q [SEP] p [SEP], token i of the query (counted with its [CLS]) stands at i, token j of the passage at
  |q| + j - 1, where |q| counts the query with [CLS] and [SEP]. The student's texts may hold a marker after [CLS], and
  between title and text a [SEP] that the pair lacks. At special tokens stands whatever it is: they are no content.
  """
  more = passages.lead - pairs.lead
  block = by_text(attention, pairs, query_length)  # [T, Lq, L]
  block = block[:, jnp.maximum(jnp.arange(query_length) - more, 0)] if more else block
  begin = 0 if pairs.starts is None else pairs.starts % attention.shape[-1]
  length = ((owned(pairs) > 0) & (by_text(pairs.types, pairs) == 0)).sum(1)  # |q|
  kind = by_text(passages.types, passages)
  index = (begin + length)[:, None] - 1 - more + jnp.arange(kind.shape[1]) - kind
  index = jnp.clip(index, 0, attention.shape[-1] - 1)
  return jnp.take_along_axis(block, jnp.broadcast_to(index[:, None], (*block.shape[:2], index.shape[1])), axis=-1)


@struct.dataclass
class Towers:
  """What the encoders make of a batch; None where no term asks."""

  queries: Embeddings = struct.field(default=None)
  passages: Embeddings = struct.field(default=None)
  cross: Float[Array, "b k"] = struct.field(default=None)
  attention: Float[Array, "b k lq lp"] = struct.field(default=None)
  attentions: Float[Array, "b k m lq lp"] = struct.field(default=None)


def evenly(layers: int, count: int) -> list[int]:
  """So many of the layers, the last one among them: 2 of 6 are layers 2 and 5, counted from 0."""
  return [(i + 1) * layers // count - 1 for i in range(count)]


def matched(params: Params) -> int:
  """How many layers of student and cross-encoder are compared (VIRT): as many as both have."""
  teacher, student = params["teacher"].encoder, params["student"].encoder
  return (
    student.architecture.layers if teacher is None else min(student.architecture.layers, teacher.architecture.layers)
  )


def in_chunks(function: Callable[..., Any], count: int, recompute: bool, *rows: Any) -> Any:
  """`function(*rows)` on `count` equal parts of the rows.

  With `recompute` in a loop, each part again in the backward pass, so that the activations of one exist at a time:
  gradient caching. Without, those of all are held, and the parts stand one after the other in the program: a loop would
  copy what is held into stacks, and back. In which order they run is then the compiler's choice.
  """
  if count == 1:  # nothing would be saved by computing the only part twice
    return function(*rows)
  if not recompute:
    parts = [function(*jax.tree.map(lambda x: x[i], cut(rows, count))) for i in range(count)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  body = jax.checkpoint(lambda part: function(*part), prevent_cse=False)
  return merged(jax.lax.map(body, cut(rows, count)))


def largest_part(count: int, most: int) -> int:
  """The size of the largest equal parts of `count` that are no larger than `most`; 0 where that is below 1."""
  return max((size for size in range(1, min(count, most) + 1) if count % size == 0), default=0)


def cut(rows: Any, count: int) -> Any:
  """[n, ...] -> [count, n / count, ...]."""
  return jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), rows)


def merged(parts: Any) -> Any:
  """[count, n / count, ...] -> [n, ...]."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


def scored(
  params: Params,
  batch: Batch,
  train: config.Train,
  pairs: Rows,
  passages: Rows | None,
  seeds: UInt32[Array, "site 3 2"] | None,
  numbers: UInt32[Array, "b"],
  size: int,
) -> Towers:
  """The cross-encoder's half of `towers`, for some queries: their pairs, and the passages that a student reads."""
  weights = train.on
  logits, attention = cross(params, pairs, of_texts(seeds, of_lists(numbers, size)), every=weights.virt > 0)
  own = lambda x: x.reshape(-1, size, *x.shape[1:])
  if not weights.kl_attention and not weights.virt:
    return Towers(cross=own(logits))
  assert passages is not None
  longest = batch.queries.longest or batch.queries.tokens.shape[1]
  seen = partial(pair_attention, pairs=pairs, passages=passages, query_length=longest)
  if not weights.virt:
    return Towers(cross=own(logits), attention=own(seen(attention)))
  depth = (params["student"] if params["teacher"].encoder is None else params["teacher"]).encoder.architecture.layers
  every = own(jax.vmap(seen, out_axes=1)(attention[jnp.array(evenly(depth, matched(params)))]))
  last: Any = every[:, :, -1] if weights.kl_attention else None
  return Towers(cross=own(logits), attention=last, attentions=every)


def parted(batch: Batch, numbers: UInt32[Array, "b"], train: config.Train) -> tuple[int, int]:
  """K, and how many chunks the queries at hand are encoded in."""
  size = len(batch.texts) // len(numbers)
  chunk = train.chunk or len(numbers)
  config.check(len(numbers) % chunk == 0, "chunk", chunk, f"does not divide {len(numbers)} queries of a device")
  lists_of = batch.pairs if batch.passages is None else batch.passages
  if lists_of.starts is not None and lists_of.unit != chunk * size:
    raise ValueError(f"a batch packed in units of {lists_of.unit // size} queries, encoded {chunk} at a time")
  return size, len(numbers) // chunk


def of_lists(numbers: UInt32[Array, "b"], size: int) -> UInt32[Array, "bk"]:
  """The numbers of the queries' passages."""
  return (numbers[:, None] * size + jnp.arange(size, dtype=numbers.dtype)).ravel()


def towers(
  params: Params,
  seeds: dict[str, UInt32[Array, "site 3 2"] | None],
  batch: Batch,
  numbers: UInt32[Array, "b"],
  model: config.Model,
  train: config.Train,
  *,
  teacher: bool = True,
) -> Towers:
  """Everything that goes through an encoder, for the queries at hand (`numbers`: their places in the global batch).

  Without `teacher`, what goes through the student's.
  """
  weights = train.on
  size, count = parted(batch, numbers, train)
  student = params["student"]
  student = unrolled(student) if count > 1 and not train.recompute and not model.scan else student
  settings: dict[str, Any] = {"late": weights.needs_late, "copies": 2 if weights.needs_twin else 1}
  settings["every"] = weights.virt > 0
  # No gradient reaches a teacher that has no loss of its own.
  teaching = params if weights.trains_teacher else jax.lax.stop_gradient(params)

  def judged(pairs, passages, numbers):
    return scored(teaching, batch, train, pairs, passages, seeds["cross"], numbers, size)

  def embedded(queries, passages, numbers):
    texts = numbers * 2 + 1, of_lists(numbers, size) * 2
    return embed_both(student, model, (queries, passages), seeds["student"], texts, **settings)

  made: Any = Towers()
  if teacher and train.needs_cross:
    made = in_chunks(judged, count, train.recompute, batch.pairs, batch.passages, numbers)
  if weights.needs_student:
    queries, passages = in_chunks(embedded, count, train.recompute, batch.queries, batch.passages, numbers)
    made = made.replace(queries=queries, passages=passages)
  return made


def taught(
  params: Params, batch: Batch, train: config.Train, key: Key[Array, ""] | None, loss: Callable, *scalars: Any
) -> tuple[Towers, Params, Batch]:
  """The cross-encoder's part of `towers`, and the gradient of its loss: of the mean of `loss(logits [b, K], *scalars)`.

  Of a cross-encoder with an encoder of its own. The gradient asks for nothing that the student makes: a chunk adds its
  own, and is not computed again. Last the batch as all else is to read it, not there before this gradient is.
  """
  student = {name: one for name, one in params.items() if name != "teacher"}  # for its shape

  def local(given, batch, numbers):
    teacher, student, scalars, seeds = given
    size, count = parted(batch, numbers, train)

    def mean(teacher, pairs, passages, numbers):
      made = scored({**student, "teacher": teacher}, batch, train, pairs, passages, seeds["cross"], numbers, size)
      return loss(made.cross, *scalars).sum() / (len(batch.known) * mesh.size()), made

    slope = jax.grad(mean, has_aux=True)

    def turn(total, part):
      gradient, made = slope(teacher, *part)
      return jax.tree.map(jnp.add, total, gradient), made

    own = batch.pairs, batch.passages, numbers
    if count == 1:
      gradient, made = slope(teacher, *own)
    else:
      gradient, made = jax.lax.scan(turn, jax.tree.map(lambda x: x * 0, teacher), cut(own, count))
      made = merged(made)
    zero = nothing_of(gradient)
    later = jax.tree.map(lambda x: x + zero, (batch.queries, batch.passages, batch.masked))
    return made, jax.tree.map(lambda x: x[None], gradient), later

  made, gradient, later = everywhere(local, (params["teacher"], student, scalars), params, batch, train, key)
  batch = dataclasses.replace(batch, **dict(zip(("queries", "passages", "masked"), later)))
  return made, {"teacher": jax.tree.map(lambda x: x.sum(0), gradient)}, batch


def nothing_of(gradient: Any) -> Int[Array, ""]:
  """0, once every layer's part of it is there: XLA does not know that no sum is above infinity.

  An optimization barrier is not enough: XLA removes it for some platforms before it chooses an order. Of a stack of
  layers it computes a single entry without the other layers, so this reads one of each.
  """
  some = lambda x: x[(slice(None), *(0,) * (x.ndim - 1))].sum()
  return (sum(map(some, jax.tree.leaves(gradient))) > jnp.inf).astype(jnp.int32)


def everywhere(function: Callable, given: tuple, params: Params, batch: Batch, train: config.Train, key: Any) -> Any:
  """`function((*given, noise's seeds), batch, numbers)` on each device, of its own queries."""
  sites = lambda encoder, more: encoder.architecture.layers + 1 + more
  student = params["student"]
  places = {"cross": sites(params["teacher"].encoder or student.encoder, 1), "student": sites(student.encoder, 0)}
  keys = (None,) * 2 if key is None else jax.random.split(key)
  noisy = {name: None if k is None else seeds(k, places[name], 3) for name, k in zip(places, keys)}
  if train.teacher == "frozen":
    noisy["cross"] = None
  numbers = mesh.split(jnp.arange(len(batch.known), dtype=jnp.uint32))
  return mesh.per_device(function, (*given, noisy), batch, numbers)


def masked_everywhere(
  params: Params, batch: MaskedRows, train: config.Train, key: Key[Array, ""] | None
) -> Float[Array, "b m"]:
  """`masked` of all rows of the global batch, on each device its own, a chunk at a time."""
  encoder = params["student"].encoder
  # The towers' keys are the first two of the same kind.
  site = None if key is None else seeds(jax.random.fold_in(key, 3), encoder.architecture.layers + 1, 3)

  def local(given, batch, numbers):
    params, site = given
    chunk = train.chunk or len(numbers)
    config.check(len(numbers) % chunk == 0, "chunk", chunk, f"does not divide {len(numbers)} rows of a device")
    one = lambda own, numbers: masked(params, own, of_texts(site, numbers))
    return in_chunks(one, len(numbers) // chunk, train.recompute, batch, numbers)

  numbers = mesh.split(jnp.arange(len(batch.tokens), dtype=jnp.uint32))
  return mesh.per_device(local, (params, site), batch, numbers)


def score(
  params: Params,
  batch: Batch,
  model: config.Model,
  train: config.Train,
  key: Key[Array, ""] | None,
  teacher: Towers | None = None,
) -> Scores:
  """All scores that the stage's loss terms ask for; what no term asks for is not traced.

  With `teacher`, what `taught` made, the cross-encoder does not run.
  """
  weights, scores = train.on, dict[str, Any]()
  if weights.mlm > 0:
    scores["masked"] = masked_everywhere(params, batch.masked, train, key)
    scores["masked_there"] = batch.masked.tokens >= 0
  if not train.needs_pairs:
    return Scores(**scores)
  size = len(batch.known)  # B
  own = lambda x: x.reshape(size, len(batch.texts) // size, *x.shape[1:])  # [B*K, ...] -> [B, K, ...]
  student = params["student"]

  def local(given, batch, numbers):
    return towers(given[0], given[1], batch, numbers, model, train, teacher=teacher is None)

  made: Any = Towers()
  if teacher is None or weights.needs_student:
    made = everywhere(local, (params,), params, batch, train, key)
  q, p, judged = made.queries, made.passages, teacher or made
  scores["cross"], scores["attention"], scores["attentions"] = judged.cross, judged.attention, judged.attentions
  if weights.needs_teacher and not train.needs_cross:
    scores["cross"] = mesh.split(jnp.zeros((size, len(batch.texts) // size), jnp.float32))

  if weights.needs_student:
    everyone = mesh.replicate(batch.texts)
    known = (batch.known[:, None, :] == everyone[None, :, None]).any(-1)  # [B, P]
    among = lambda scores: scores
    if train.in_batch is not None:
      group = lambda count: jnp.arange(count) // (count // size * train.in_batch)
      others = mesh.split(group(size))[:, None] != group(len(batch.texts))[None, :]
      known |= others
      among = lambda scores: jnp.where(others, -jnp.inf, scores)

    if weights.needs_dual:
      scores["dual"] = jnp.einsum("bh,bkh->bk", q.vector, own(p.vector))
      whole = jnp.einsum("bh,ph->bp", q.vector, mesh.replicate(p.vector))
      scores["dual_pool"] = pool(scores["dual"], whole, known)
      if weights.needs_twin:
        scores["twins"] = (among(whole), among(jnp.einsum("bh,ph->bp", q.twin, mesh.replicate(p.twin))))

    if weights.needs_late:
      similarity = matches(q, own(p.tokens))
      scores["late"] = maxsim(similarity, q.mask[:, None], own(p.mask))
      if train.late_pool == "global":
        scores["late_pool"] = pool(scores["late"], maxsim_pool(q, p), known)

    if weights.kl_attention > 0:
      scores["matches"] = similarity
      if not train.needs_cross:
        scores["attention"] = jnp.ones_like(similarity)
    if weights.virt > 0:
      layers = jnp.array(evenly(student.encoder.architecture.layers, matched(params)))
      q_hidden, p_hidden = q.hidden[:, :, layers], own(p.hidden)[..., layers, :]
      scores["products"] = jnp.einsum("bqmh,bkpmh->bkmqp", q_hidden, p_hidden, preferred_element_type=jnp.float32)
    scores["query_content"] = q.content
    scores["passage_content"] = own(p.content)

  return Scores(**scores)
