"""The three scorers as pure functions of (params, batch, key), and all the scores that a loss asks for.

dual-encoder      s_de(q, p) = <h(q), h(p)>                       one vector a text
late interaction  s_li(q, p) = sum_i max_j <e_i(q), e_j(p)>       one vector a token, the same forward pass
cross-encoder     s_ce(q, p) = w . dropout(tanh(W h_cls([q; p]))) + b
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx, struct

from ernie_jax import config
from ernie_jax.encoder import Encoder, Rows, drop, linear, with_dropout
from ernie_jax.mesh import replicate

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, Key

Params = dict  # {"student": Student, "teacher": Teacher}


@struct.dataclass
class Batch:
  """B queries, each with its own list of K passages: the positive at index 0, then hard negatives."""

  queries: Rows  # [B, Lq]
  passages: Rows  # [B*K, Lp], query by query
  pairs: Rows  # [B*K, Lj]: [CLS] query [SEP] passage [SEP], of the same tokens
  texts: Int[Array, "bk"]  # identity of each passage's text: equal texts have equal numbers
  known: Int[Array, "b m"]  # text numbers of the query's known positives, padded with -1


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
  )  # two dropout passes, nothing masked
  attention: Float[Array, "b k lq lp"] = struct.field(default=None)  # the cross-encoder's, query token to passage token
  matches: Float[Array, "b k lq lp"] = struct.field(default=None)  # late interaction's <e_i, e_j>
  query_content: Bool[Array, "b lq"] = struct.field(default=None)  # tokens that are neither special nor padding
  passage_content: Bool[Array, "b k lp"] = struct.field(default=None)


class Student(nnx.Module):
  """One encoder for dual-encoder and late interaction (a second one for queries if not tied)."""

  def __init__(self, a: config.Architecture, model: config.Model, key: Key[Array, ""]):
    a = with_dropout(a, model.dropout)
    keys = jax.random.split(key, 3)
    encoder = lambda k: Encoder(a, k, dtype=model.dtype, scan=model.scan, remat=model.remat)
    self.encoder = encoder(keys[0])
    self.query_encoder = None if model.tied else encoder(keys[0])
    self.projection = linear(a.width, model.late_width, nnx.Rngs(keys[2]), bias=False) if model.late_width else None


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


@struct.dataclass
class Embeddings:
  """What one student pass makes of N texts."""

  vector: Float[Array, "n h"]
  tokens: Float[Array, "n l d"]  # unit length
  mask: Bool[Array, "n l"]


def embed(student: Student, model: config.Model, rows: Rows, key: Key[Array, ""] | None, query: bool) -> Embeddings:
  """Dual-encoder vectors and late-interaction token vectors, float32, from one forward pass; one text a row."""
  encoder = student.query_encoder if query and student.query_encoder is not None else student.encoder
  hidden, _ = encoder(rows, key)
  hidden, mask = hidden.astype(jnp.float32), rows.segments > 0
  if model.pooling == "mean":
    vector = jnp.where(mask[..., None], hidden, 0).sum(1) / mask.sum(1, keepdims=True)
  else:
    vector = hidden[:, 0]
  tokens = hidden if student.projection is None else student.projection(hidden)
  return Embeddings(unit(vector) if model.cosine else vector, unit(tokens), mask)


def embed_copies(
  student: Student, model: config.Model, rows: Rows, key: Key[Array, ""] | None, query: bool, copies: int
) -> list[Embeddings]:
  """`embed` of several copies of the same rows in one forward pass."""
  repeat = lambda x: jnp.broadcast_to(x[:, None], (len(x), copies, *x.shape[1:])).reshape(-1, *x.shape[1:])
  together = embed(student, model, jax.tree.map(repeat, rows), key, query)
  apart = jax.tree.map(lambda x: x.reshape(-1, copies, *x.shape[1:]), together)
  return [jax.tree.map(lambda x: x[:, i], apart) for i in range(copies)]


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
  """x / |x|, with a finite gradient at 0."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def cross(params: Params, rows: Rows, key: Key[Array, ""] | None) -> tuple[Float[Array, "n"], Float[Array, "n lj lj"]]:
  """The cross-encoder's logit of each joined pair, and its last layer's attention, averaged over heads."""
  teacher: Teacher = params["teacher"]
  encoder = params["student"].encoder if teacher.encoder is None else teacher.encoder
  encoding, dropping = (None, None) if key is None else jax.random.split(key)
  hidden, attention = encoder(rows, encoding)
  first = hidden[:, 0].astype(jnp.float32)
  if teacher.pooler is not None:
    first = jnp.tanh(teacher.pooler(first))
  return teacher.head(drop(first, encoder.architecture.dropout, dropping))[:, 0], attention.mean(1)


def matches(q: Embeddings, p: Float[Array, "b k lp d"]) -> Float[Array, "b k lq lp"]:
  """<e_i(q), e_j(p)> of each query with its own list."""
  return jnp.einsum("bqd,bkpd->bkqp", q.tokens, p, preferred_element_type=jnp.float32)


def maxsim(
  similarity: Float[Array, "*n lq lp"], query_mask: Bool[Array, "*#n lq"], passage_mask: Bool[Array, "*#n lp"]
) -> Float[Array, "*n"]:
  """sum_i max_j similarity[i, j]: masked passage tokens are -inf before the maximum, masked query tokens add 0."""
  best = jnp.where(passage_mask[..., None, :], similarity, -jnp.inf).max(-1)
  return jnp.where(query_mask, best, 0).sum(-1)


def maxsim_pool(q: Embeddings, p: Embeddings, chunk: int = 16) -> Float[Array, "b p"]:
  """Late-interaction scores of every query with every passage, a chunk of passages at a time.

  No [B, P, Lq, Lp] tensor exists: each chunk's similarities are made again in the backward pass.
  """
  size = len(p.tokens)
  chunk = max(c for c in range(1, min(chunk, size) + 1) if size % c == 0)

  @jax.checkpoint
  def one(tokens_and_mask):
    tokens, mask = tokens_and_mask
    similarity = jnp.einsum("bqd,cpd->bcqp", q.tokens, tokens, preferred_element_type=jnp.float32)
    return maxsim(similarity, q.mask[:, None], mask[None])

  split = lambda x: x.reshape(size // chunk, chunk, *x.shape[1:])
  chunks = jax.lax.map(one, (split(p.tokens), split(p.mask)))  # [P/chunk, B, chunk]
  return chunks.transpose(1, 0, 2).reshape(len(q.tokens), size)


def pool(own: Float[Array, "b k"], scores: Float[Array, "b p"], known: Bool[Array, "b p"]) -> Float[Array, "b c"]:
  """The own positive, then every passage of the pool that is not a known positive of the query (C = 1 + P)."""
  return jnp.concatenate([own[:, :1], jnp.where(known, -jnp.inf, scores)], axis=1)


def pair_attention(
  attention: Float[Array, "b k lj lj"], queries: Rows, passage_length: int
) -> Float[Array, "b k lq lp"]:
  """Cuts the query-to-passage block out of joined pairs' attention.

  In [CLS] q [SEP] p [SEP], query token i stands at i and passage token j (counted with the passage's own [CLS] at 0)
  at |q| + j - 1, where |q| counts the query's [CLS] and [SEP].
  """
  block = attention[:, :, : queries.tokens.shape[1]]  # [B, K, Lq, Lj]
  length = (queries.segments > 0).sum(1)  # [B]
  index = jnp.minimum(length[:, None] - 1 + jnp.arange(passage_length), attention.shape[-1] - 1)
  return jnp.take_along_axis(
    block, jnp.broadcast_to(index[:, None, None, :], (*block.shape[:3], passage_length)), axis=-1
  )


def content(rows: Rows, special: tuple[int, ...]) -> Bool[Array, "n l"]:
  """Tokens that are neither padding nor special."""
  return (rows.segments > 0) & ~jnp.isin(rows.tokens, jnp.array(special or (-1,)))


def score(params: Params, batch: Batch, model: config.Model, train: config.Train, key: Key[Array, ""] | None) -> Scores:
  """All scores that the stage's loss terms ask for; what no term asks for is not traced."""
  weights, scores = train.weights, {}
  size = len(batch.known)  # B
  own = lambda x: x.reshape(size, len(batch.texts) // size, *x.shape[1:])  # [B*K, ...] -> [B, K, ...]
  keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
  student = params["student"]

  if weights.needs_teacher:
    teaching = None if train.frozen_teacher else keys[0]
    cross_scores, attention = cross(params, batch.pairs, teaching)
    scores["cross"] = own(cross_scores)

  if weights.needs_student:
    # DualReg's twins are two copies of each row in one pass: dropout is independent between rows.
    copies = 2 if weights.needs_twin else 1
    q, *q_twin = embed_copies(student, model, batch.queries, keys[1], True, copies)
    p, *p_twin = embed_copies(student, model, batch.passages, keys[2], False, copies)
    scores["dual"] = jnp.einsum("bh,bkh->bk", q.vector, own(p.vector))
    everyone = replicate(batch.texts)
    known = (batch.known[:, None, :] == everyone[None, :, None]).any(-1)  # [B, P]
    whole = jnp.einsum("bh,ph->bp", q.vector, replicate(p.vector))
    scores["dual_pool"] = pool(scores["dual"], whole, known)

    if weights.needs_twin:
      scores["twins"] = (whole, jnp.einsum("bh,ph->bp", q_twin[0].vector, replicate(p_twin[0].vector)))

    if weights.needs_late:
      similarity = matches(q, own(p.tokens))
      scores["late"] = maxsim(similarity, q.mask[:, None], own(p.mask))
      if train.late_pool == "global":
        everything = Embeddings(p.vector, replicate(p.tokens), replicate(p.mask))
        scores["late_pool"] = pool(scores["late"], maxsim_pool(q, everything), known)

    if weights.kl_attention > 0:
      special = student.encoder.architecture.special
      scores["attention"] = pair_attention(own(attention), batch.queries, batch.passages.tokens.shape[1])
      scores["matches"] = similarity
      scores["query_content"] = content(batch.queries, special)
      scores["passage_content"] = own(content(batch.passages, special))

  return Scores(**scores)
