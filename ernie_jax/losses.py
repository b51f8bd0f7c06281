"""The loss terms, one short function each, on score matrices alone; named, then weighted once.

Every KL is formed from log-probabilities on both sides, in float32; its teacher side stands under `stop_gradient`
here, where it is formed. Terms are means over the queries of the global batch; `mlm` over its masked tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ernie_jax import config
from ernie_jax.scores import Scores

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float


def nll(scores: Float[Array, "b c"]) -> Float[Array, "b"]:
  """-log p(positive), the positive at index 0 (METHOD: nll_ce, nll_li, nll_de)."""
  return jax.nn.logsumexp(scores, axis=-1) - scores[:, 0]


def divergence(p: Float[Array, "*n c"], q: Float[Array, "*n c"]) -> Float[Array, "*n"]:
  """KL(p || q) of log-probabilities; candidates that are -inf in p count 0."""
  there = p != -jnp.inf  # a score that is not a number must show, not count 0
  return jnp.sum(jnp.where(there, jnp.exp(p) * (jnp.where(there, p, 0) - jnp.where(there, q, 0)), 0), axis=-1)


def kl(teacher: Float[Array, "*n c"], student: Float[Array, "*n c"]) -> Float[Array, "*n"]:
  """KL(softmax teacher || softmax student); no gradient reaches the teacher (METHOD: kl_ce_li, kl_li_de, kl_ce_de)."""
  teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher), axis=-1)
  return divergence(teacher, jax.nn.log_softmax(student, axis=-1))


def symmetric_kl(a: Float[Array, "*n c"], b: Float[Array, "*n c"]) -> Float[Array, "*n"]:
  """(KL(a || b) + KL(b || a)) / 2 of scores, with gradient on both sides (METHOD: DualReg)."""
  a, b = jax.nn.log_softmax(a, axis=-1), jax.nn.log_softmax(b, axis=-1)
  return (divergence(a, b) + divergence(b, a)) / 2


def attention_kl(
  attention: Float[Array, "b k lq lp"],
  matches: Float[Array, "b k lq lp"],
  query_content: Bool[Array, "b lq"],
  passage_content: Bool[Array, "b k lp"],
  temperature: Float[Array, ""] | float,
) -> Float[Array, "b"]:
  """Mean over real query tokens and own passages of KL(cross-encoder's attention || late interaction's matches).

  Both are distributions over the passage's real tokens; special tokens are left out and the rest renormalised.
  A query or passage without any real token adds 0.
  """
  seen = passage_content[:, :, None, :]
  teacher = jnp.where(seen, jnp.log(jnp.maximum(attention, jnp.finfo(jnp.float32).tiny)), -jnp.inf)
  student = jnp.where(seen, matches / temperature, -jnp.inf)
  real = query_content[:, None, :] & passage_content.any(-1)[:, :, None]  # [B, K, Lq]
  rows = real[..., None]
  each = kl(jnp.where(rows, teacher, 0), jnp.where(rows, student, 0))
  count = jnp.maximum(real.sum((1, 2)), 1)
  return jnp.where(real, each, 0).sum((1, 2)) / count


def margin_mse(teacher: Float[Array, "b k"], student: Float[Array, "b k"]) -> Float[Array, "b"]:
  """Mean over negatives of the squared difference of the margins s(positive) - s(negative) (Hofstätter et al. 2020)."""
  margin = lambda s: s[:, :1] - s[:, 1:]
  return jnp.square(margin(jax.lax.stop_gradient(teacher)) - margin(student)).mean(-1)


def kl_listwise(a: Float[Array, "b k"], b: Float[Array, "b k"]) -> Float[Array, "b"]:
  """KL(softmax a || softmax b) with gradient on both sides (RocketQAv2, dynamic listwise distillation)."""
  return divergence(jax.nn.log_softmax(a, axis=-1), jax.nn.log_softmax(b, axis=-1))


def virt(
  teacher: Float[Array, "b k m lq lp"],
  student: Float[Array, "b k m lq lp"],
  query_content: Bool[Array, "b lq"],
  passage_content: Bool[Array, "b k lp"],
) -> Float[Array, "b"]:
  """Squared error of each attention probability from a query's tokens to a passage's, summed over the passage's tokens.

  Mean over layers, real query tokens and own passages (VIRT, Li et al. 2021, its query-to-passage half, with LEAD's
  unscaled products of hidden states). `teacher` are probabilities, renormalised here; `student` are products.
  """
  seen = passage_content[:, :, None, None, :]
  read = jnp.where(seen, jax.lax.stop_gradient(teacher), 0)
  read = read / jnp.maximum(read.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  real = query_content[:, None, :] & passage_content.any(-1)[:, :, None]  # [B, K, Lq]
  own = jax.nn.softmax(jnp.where(seen, student, jnp.finfo(jnp.float32).min), axis=-1)
  each = jnp.where(seen, jnp.square(read - own), 0).sum(-1)
  return jnp.where(real, each.mean(2), 0).sum((1, 2)) / jnp.maximum(real.sum((1, 2)), 1)


def corrected(
  cross: Float[Array, "b k"], late: Float[Array, "b k"], temperature: dict[str, Any]
) -> Float[Array, "b k"]:
  """A residual teacher's score: its own logit corrects late interaction, which gets no gradient (`Train.residual`)."""
  return cross / temperature["cross"] + jax.lax.stop_gradient(late) / temperature["late"]


def terms(scores: Scores, train: config.Train, done: Float[Array, ""] | float = 0.0) -> dict[str, Float[Array, ""]]:
  """Every term that is on, unweighted, but for those that need passes of their own (`step.loss`).

  `done` is how far the stage is, 0 in its first step and 1 in its last: temperatures may change on the way.
  """
  t = scheduled(train.temperature, train.final_temperature, done)
  over: Callable = lambda x, temperature: None if x is None else x / temperature
  cross = over(scores.cross, t["cross"])
  if train.residual and train.needs_cross:
    cross = corrected(scores.cross, scores.late, t)
  dual, late = over(scores.dual, t["dual"]), over(scores.late, t["late"])
  dual_pool, late_pool = over(scores.dual_pool, t["dual"]), over(scores.late_pool, t["late"])
  # Both sides of kl_li_de range over late interaction's candidates.
  late_all, dual_all = (late_pool, dual_pool) if train.late_pool == "global" else (late, dual)
  twins = [over(s, t["dual"]) for s in scores.twins or ()]
  content = (scores.query_content, scores.passage_content)
  each = {
    "nll_ce": lambda: nll(cross),
    "nll_li": lambda: nll(late_all),
    "nll_de": lambda: nll(dual_pool if train.dual_pool == "global" else dual),
    "kl_ce_li": lambda: kl(cross, late),
    "kl_li_de": lambda: kl(late_all, dual_all),
    "kl_ce_de": lambda: kl(cross, dual),
    "kl_attention": lambda: attention_kl(scores.attention, scores.matches, *content, t["attention"]),
    "dualreg_query": lambda: symmetric_kl(*twins),
    "dualreg_passage": lambda: symmetric_kl(*(s.T for s in twins)),
    "margin_mse": lambda: margin_mse(cross, dual),
    "kl_listwise": lambda: kl_listwise(cross, dual),
    "kl_bidirectional": lambda: 2 * symmetric_kl(cross, dual),
    "virt": lambda: virt(scores.attentions, scores.products, *content),
    "mlm": lambda: scores.masked.sum() / jnp.maximum(scores.masked_there.sum(), 1),
  }
  return {name: term().mean() for name, term in each.items() if name in train.on.active}


def scheduled(first: Any, last: Any | None, done: Float[Array, ""] | float) -> dict[str, Any]:
  """The numbers of a dataclass, on the way to those of another, linearly; None: they stay."""
  begin = dataclasses.asdict(first)
  if last is None:
    return begin
  end = dataclasses.asdict(last)
  return {name: x + (end[name] - x) * done for name, x in begin.items()}


def total(
  terms: dict[str, Float[Array, ""]], train: config.Train, done: Float[Array, ""] | float = 0.0
) -> Float[Array, ""]:
  """The weighted sum: the loss."""
  weights = scheduled(train.weights, train.final_weights, done)
  return sum((weights[name] * value for name, value in terms.items()), start=jnp.zeros(()))
