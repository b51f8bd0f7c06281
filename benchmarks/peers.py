"""The training step in PyTorch, for benchmarks/cpu.py and gpu.py: Hugging Face's BertModel under the same losses.

Written as one would write it there: attention by `scaled_dot_product_attention`, AdamW by the fused kernel, clipping by
the global norm, and on a GPU autocast to bfloat16 and `torch.compile`. The first loss and gradient norm must be ours.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from ernie_jax import checkpoints, config, names, scores
from ernie_jax.encoder import Encoder, Rows


def bert(encoder: Encoder) -> BertModel:
  """The encoder's weights in Hugging Face's model, without dropout."""
  a = encoder.architecture
  model = BertModel(
    BertConfig(
      vocab_size=a.vocabulary,
      hidden_size=a.width,
      num_hidden_layers=a.layers,
      num_attention_heads=a.heads,
      intermediate_size=a.inner,
      max_position_embeddings=a.positions,
      type_vocab_size=a.types,
      layer_norm_eps=a.epsilon,
      hidden_dropout_prob=0.0,
      attention_probs_dropout_prob=0.0,
      attn_implementation="sdpa",
    ),
    add_pooling_layer=False,
  )
  arrays = names.released({name: np.asarray(x) for name, x in checkpoints.named(encoder).items()})
  missing, unknown = model.load_state_dict({n: torch.tensor(x) for n, x in arrays.items()}, strict=False)
  if unknown or [n for n in missing if "position_ids" not in n]:
    raise SystemExit(f"not the same model: lacks {missing}, has {unknown}")
  return model


def linear(module: Any) -> torch.nn.Linear:
  kernel = torch.tensor(np.asarray(module.kernel[...]).T.copy())
  made = torch.nn.Linear(kernel.shape[1], kernel.shape[0])
  with torch.no_grad():
    made.weight.copy_(kernel)
    made.bias.copy_(torch.tensor(np.asarray(module.bias[...])))
  return made


class Text:
  """Rows of one text each, as tensors."""

  def __init__(self, rows: Rows, special: tuple[int, ...], device: str):
    put = lambda x: torch.tensor(np.asarray(x), device=device)
    self.tokens, self.types, self.mask = put(rows.tokens).long(), put(rows.types).long(), put(rows.segments) > 0
    self.content = self.mask & ~torch.isin(self.tokens, put(np.array(special or (-1,))))


def log_softmax(x: torch.Tensor) -> torch.Tensor:
  return torch.log_softmax(x.float(), -1)


def nll(x: torch.Tensor) -> torch.Tensor:
  return (torch.logsumexp(x, -1) - x[:, 0]).mean()


def kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
  """KL of the last axis; -inf in both adds 0."""
  p, q = log_softmax(teacher.detach()), log_softmax(student)
  there = torch.isfinite(p)
  return torch.where(there, p.exp() * (p.masked_fill(~there, 0) - q.masked_fill(~there, 0)), 0).sum(-1)


def mean(x: torch.Tensor, text: Text) -> torch.Tensor:
  """Mean over a text's tokens, of unit length."""
  return functional.normalize((x * text.mask[..., None]).sum(1) / text.mask.sum(1, keepdim=True), dim=-1)


class Cascade(torch.nn.Module):
  """Student and teacher, tied towers, mean-pooled cosine vectors; the terms of `train` but for DualReg."""

  def __init__(self, params: scores.Params, train: config.Train):
    super().__init__()
    self.train_config = train
    if train.on.needs_student:
      self.student = bert(params["student"].encoder)
    if train.needs_cross:
      teacher = params["teacher"]
      self.teacher, self.pooler, self.head = bert(teacher.encoder), linear(teacher.pooler), linear(teacher.head)

  def tokens(self, text: Text) -> torch.Tensor:
    return self.student(text.tokens, text.mask, text.types).last_hidden_state.float()

  def cross(self, pairs: Text) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits, and where a term asks the last layer's attention, averaged over heads: it is computed once more."""
    read = self.train_config.weights.kl_attention > 0
    out = self.teacher(pairs.tokens, pairs.mask, pairs.types, output_hidden_states=read)
    logits = self.head(torch.tanh(self.pooler(out.last_hidden_state[:, 0].float())))[:, 0]
    if not read:
      return logits, None
    with torch.no_grad():
      x, own = out.hidden_states[-2], self.teacher.encoder.layer[-1].attention.self
      heads = lambda y: y.unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
      weights = heads(own.query(x)) @ heads(own.key(x)).transpose(-1, -2) / own.attention_head_size**0.5
      weights = weights.float().masked_fill(~pairs.mask[:, None, None], -torch.inf).softmax(-1).mean(1)
    return logits, weights

  def forward(self, queries: Text | None, passages: Text | None, pairs: Text | None) -> torch.Tensor:
    train, t, w = self.train_config, self.train_config.temperature, self.train_config.weights
    if queries is None or passages is None:  # the cross-encoder alone
      return nll(self.cross(pairs)[0].view(train.batch, -1) / t.cross)
    q, p = self.tokens(queries), self.tokens(passages)
    b, k = len(q), len(p) // len(q)
    q_vector, p_vector = mean(q, queries), mean(p, passages)
    whole = q_vector @ p_vector.T / t.dual
    own = torch.arange(b * k, device=q.device).view(b, k)
    dual = whole.gather(1, own)
    mine = torch.zeros_like(whole, dtype=torch.bool).scatter_(1, own[:, :1], True)
    pooled = lambda s: torch.cat([s.gather(1, own[:, :1]), s.masked_fill(mine, -torch.inf)], 1)
    terms = {"nll_de": nll(pooled(whole))}
    if w.needs_late:
      q_unit, p_unit = functional.normalize(q, dim=-1), functional.normalize(p, dim=-1)
      matches = torch.einsum("bqd,bkpd->bkqp", q_unit, p_unit.unflatten(0, (b, k)))
      seen = passages.mask.view(b, k, 1, -1)
      late = (matches.masked_fill(~seen, -torch.inf).amax(-1) * queries.mask[:, None]).sum(-1) / t.late
      late_all, dual_all = late, dual
      if train.late_pool == "global":
        every = torch.einsum("bqd,cpd->bcqp", q_unit, p_unit).masked_fill(~passages.mask[:, None], -torch.inf)
        late_all = pooled((every.amax(-1) * queries.mask[:, None]).sum(-1) / t.late)
        dual_all = pooled(whole)
      terms |= {"nll_li": nll(late_all), "kl_li_de": kl(late_all, dual_all).mean()}
    if train.needs_cross and pairs is not None:
      logits, attention = self.cross(pairs)
      logits = logits.view(b, k) / t.cross
      terms |= {"nll_ce": nll(logits), "kl_ce_li": kl(logits, late).mean(), "kl_ce_de": kl(logits, dual).mean()}
      if attention is not None:
        length = (pairs.mask & (pairs.types == 0)).sum(1)
        place = (length[:, None] - 1 + torch.arange(p.shape[1], device=q.device) - passages.types).clamp(
          0, attention.shape[-1] - 1
        )
        block = attention[:, : q.shape[1]].gather(2, place[:, None].expand(-1, q.shape[1], -1)).unflatten(0, (b, k))
        unseen = ~passages.content.view(b, k, 1, -1)
        theirs = block.clamp_min(torch.finfo(torch.float32).tiny).log().masked_fill(unseen, -torch.inf)
        real = queries.content[:, None].expand(-1, k, -1)
        each = kl(theirs, (matches / t.attention).masked_fill(unseen, -torch.inf)) * real
        terms["kl_attention"] = (each.sum((1, 2)) / real.sum((1, 2)).clamp_min(1)).mean()
    weights = {name: getattr(w, name) for name in terms}
    return sum(weights[name] * x for name, x in terms.items())


class Runner:
  """A step, its state and its times. `autocast` and `compiled` as one would on a GPU."""

  def __init__(
    self, params: scores.Params, train: config.Train, batch: scores.Batch, device: str, autocast: bool, compiled: bool
  ):
    special = params["student"].encoder.architecture.special
    text = lambda rows: None if rows is None else Text(rows, special, device)
    self.texts = [text(rows) for rows in (batch.queries, batch.passages, batch.pairs)]
    model = Cascade(params, train).to(device)
    self.forward = torch.compile(model) if compiled else model
    self.setup(model, train, device, autocast)

  def setup(self, model: torch.nn.Module, train: config.Train, device: str, autocast: bool) -> None:
    o = train.optimizer
    self.parameters = list(model.parameters())
    self.optimizer = torch.optim.AdamW(self.parameters, o.learning_rate, weight_decay=o.weight_decay, fused=True)
    self.device, self.autocast, self.clip = device, autocast, o.clip
    self.spent: list[tuple[float, float]] = []
    self.loss = self.norm = 0.0

  def total(self) -> torch.Tensor:
    return self.forward(*self.texts)

  def __call__(self, count: int = 1) -> None:
    """So many steps, of which the last is waited for."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
      with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
        loss = self.total()
      self.optimizer.zero_grad(set_to_none=True)
      loss.backward()
      norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
      self.optimizer.step()
    self.loss, self.norm = float(loss.detach()), float(norm)
    if self.device == "cuda":
      torch.cuda.synchronize()
    self.spent.append(((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count))


class SentenceTransformers(Runner):
  """Its MultipleNegativesRankingLoss over its own model of the same weights, a column of texts at a time."""

  def __init__(self, params: scores.Params, train: config.Train, batch: scores.Batch, device: str, autocast: bool):
    from sentence_transformers import SentenceTransformer, losses, models
    from transformers import BertTokenizerFast

    a = params["student"].encoder.architecture
    with tempfile.TemporaryDirectory() as folder:  # it reads a model from files
      bert(params["student"].encoder).save_pretrained(folder)
      (Path(folder) / "vocab.txt").write_text("".join(f"[unused{i}]\n" for i in range(a.vocabulary)))
      BertTokenizerFast(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
      transformer = models.Transformer(folder)
    modules = [transformer, models.Pooling(a.width, "mean"), models.Normalize()]
    self.model, columns = SentenceTransformer(modules=modules, device=device), 1 + train.negatives
    self.objective = losses.MultipleNegativesRankingLoss(self.model, scale=1 / train.temperature.dual)
    text = lambda rows: Text(rows, (), device)
    q, p = text(batch.queries), text(batch.passages)
    pick = lambda t, rows: {
      "input_ids": t.tokens[rows],
      "token_type_ids": t.types[rows],
      "attention_mask": t.mask[rows].long(),
    }
    self.features = [pick(q, slice(None)), *(pick(p, slice(i, None, columns)) for i in range(columns))]
    self.setup(self.model, train, device, autocast)

  def total(self) -> torch.Tensor:
    return self.objective([dict(own) for own in self.features], None)
