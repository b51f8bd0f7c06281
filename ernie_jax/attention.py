"""Where the cross-encoder looks, and what late interaction matches: the two maps that `kl_attention` brings together.

Both are distributions over a passage's tokens, one for each token of the query. `record` keeps the maps of a pair as
JSON, before and after training, for the report to draw.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax import config, losses, mesh, retrieval, scores
from ernie_jax.templates import Template

TOKENS = 24  # of a passage that are kept; what the others get is summed


@dataclasses.dataclass(frozen=True)
class Maps:
  """Of N pairs; special tokens and padding have neither rows nor columns of their own: 0 there."""

  cross: np.ndarray  # [N, Lq, Lp] the cross-encoder's last layer, averaged over heads
  late: np.ndarray  # [N, Lq, Lp] softmax of late interaction's matches
  divergence: np.ndarray  # [N] KL(cross || late), mean over the query's tokens: the term kl_attention
  queries: np.ndarray  # [N, Lq] tokens
  passages: np.ndarray  # [N, Lp]
  query_content: np.ndarray  # bool [N, Lq] neither special nor padding
  passage_content: np.ndarray  # bool [N, Lp]


@functools.partial(jax.jit, static_argnames=("model", "train"))
def _maps(params: scores.Params, batch: scores.Batch, model: config.Model, train: config.Train):
  s = scores.score(params, batch, model, train, None)
  content = s.query_content, s.passage_content
  temperature = train.temperature.attention
  seen = s.query_content[:, None, :, None] & s.passage_content[:, :, None, :]
  share = lambda x: jnp.where(seen, jax.nn.softmax(jnp.where(seen, x, -jnp.inf), axis=-1), 0)[:, 0]
  cross = share(jnp.log(jnp.maximum(s.attention, jnp.finfo(jnp.float32).tiny)))
  apart = losses.attention_kl(s.attention, s.matches, *content, temperature)
  return cross, share(s.matches / temperature), apart, content[0], content[1][:, 0]


def maps(
  params: scores.Params,
  model: config.Model,
  queries: Sequence[np.ndarray],
  passages: Sequence[np.ndarray],
  template: Template,
  temperature: float,
) -> Maps:
  """Of N queries, each with one passage, given as tokens. Runs on one device of this host, in any process alone."""
  read, texts = [template.query(q) for q in queries], [template.passage(p) for p in passages]
  data, numbers = template.data, np.arange(len(read), dtype=np.int32)
  rows = {
    "queries": template.queries(read, data.query_length),
    "passages": template.passages(texts, data.passage_length),
    "pairs": template.pairs(read, texts, data.pair_length),
  }
  batch = scores.Batch(**rows, texts=numbers, known=numbers[:, None])  # type: ignore[arg-type]  # numpy, until placed
  only = config.Weights.only(kl_attention=1.0)
  train = config.Train(weights=only, temperature=config.Temperatures(attention=temperature))
  one = mesh.make(jax.local_devices()[:1])
  with jax.set_mesh(one):
    held = {name: retrieval.placed(module, one) for name, module in params.items()}
    cross, late, divergence, *content = map(np.asarray, _maps(held, mesh.shard(batch, one), model, train))
  return Maps(
    cross, late, divergence, np.asarray(rows["queries"].tokens), np.asarray(rows["passages"].tokens), *content
  )


def record(
  trained: dict[str, scores.Params],
  model: config.Model,
  queries: Sequence[np.ndarray],
  passages: Sequence[np.ndarray],
  template: Template,
  temperature: float,
) -> list[dict[str, Any]]:
  """For each pair its tokens, and under each name in `trained` the maps of those parameters, to 3 digits.

  A passage shows its first `TOKENS` tokens; with more, each row of a map ends with what all the others get together,
  and `more` counts them.
  """
  found = {name: maps(params, model, queries, passages, template, temperature) for name, params in trained.items()}
  words = lambda tokens: [template.tokenizer.backend.id_to_token(int(t)) or "" for t in tokens]
  pairs = []
  for i in range(len(queries)):
    pair: dict[str, Any] = {}
    for name, own in found.items():
      rows, columns = np.flatnonzero(own.query_content[i]), np.flatnonzero(own.passage_content[i])
      kept, rest = columns[:TOKENS], columns[TOKENS:]
      pair |= {"query_tokens": words(own.queries[i, rows]), "passage_tokens": words(own.passages[i, kept])}
      pair["more"] = len(rest)
      values = {"cross": own.cross[i][rows], "late": own.late[i][rows]}
      cut = {
        system: np.concatenate([x[:, kept], x[:, rest].sum(1, keepdims=True)], axis=1) if len(rest) else x[:, kept]
        for system, x in values.items()
      }
      rounded = {system: np.round(x.astype(float), 3).tolist() for system, x in cut.items()}
      pair[name] = rounded | {"kl": round(float(own.divergence[i]), 3)}
    pairs.append(pair)
  return pairs
