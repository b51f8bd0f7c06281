"""What a training step costs: the model's FLOPs, and what chips can do.

Model FLOPs are those of the definition of MFU (PaLM, Chowdhery et al. 2022, appendix B): the matrix products that the
method asks for. Recomputation (`model.remat`, `chunk` with `recompute`) and element-wise work are left out; padding
counts as tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from ernie_jax import config


class Chip(NamedTuple):
  """Peak of dense bfloat16 products in FLOP/s, usable memory in bytes, interconnect in bytes/s (sent, all links)."""

  flops: float
  memory: float
  interconnect: float


GIB = 2**30
# Keys are `device_kind` as jax reports it. Google Cloud's TPU pages (docs.cloud.google.com/tpu/docs/v5e and its
# neighbours) give peak and Gbit/s of one chip, and v4's memory; of v5e's 16 GB, v5p's 95 and v6e's 32, what libtpu
# says is there for a program.
# NVIDIA's data sheets give peak (dense, the "with sparsity" figure halved) and NVLink in both directions, halved here.
V4 = Chip(275e12, 32e9, 2400e9 / 8)
V5E = Chip(197e12, 15.75 * GIB, 1600e9 / 8)
V5P = Chip(459e12, 95.74 * GIB, 4800e9 / 8)
V6E = Chip(918e12, 31.25 * GIB, 3584e9 / 8)
CHIPS = {
  "TPU v4": V4,
  "TPU v5 lite": V5E,
  "TPU v5e": V5E,
  "TPU v5": V5P,
  "TPU v5p": V5P,
  "TPU v6 lite": V6E,
  "TPU v6e": V6E,
  "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 300e9),
  "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 300e9),
  "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 300e9),
  "NVIDIA H100 80GB HBM3": Chip(989.4e12, 80e9, 450e9),
  "NVIDIA H100 PCIe": Chip(756e12, 80e9, 300e9),
  "NVIDIA H200": Chip(989.4e12, 141e9, 450e9),
}


def forward(a: config.Architecture, rows: int, length: int) -> float:
  """FLOPs of one encoder pass over `rows` rows of `length` tokens.

  A token and layer: query, key, value, output (4 H^2) and the feed-forward network (2 H inner), 2 FLOPs each; then
  <query, key> and the mixing of values with each of the row's tokens (2 H each).
  """
  token = 2 * (4 * a.width**2 + 2 * a.width * a.inner) + 4 * length * a.width
  return float(rows * length * a.layers * token)


def flops(
  student: config.Architecture,
  teacher: config.Architecture,
  model: config.Model,
  train: config.Train,
  data: config.Data,
  rows: dict[str, tuple[int, int]],
) -> float:
  """Model FLOPs of one training step over the global batch, for the terms that are on (METHOD: shapes, three scorers).

  `rows` are the rows of the global batch and their tokens, by tower: "queries" (not there where they stand in the rows
  of passages), "passages", "pairs", "masked".
  What is trained counts three times (forward, and twice that backward), a cross-encoder that no term trains once.
  """
  weights, terms = train.on, train.on.active
  queries, lists = train.batch, 1 + train.negatives
  passages = queries * lists  # P: the pool
  towers = [rows[tower] for tower in ("queries", "passages") if tower in rows]
  total = 0.0

  if train.needs_cross:
    a = student if model.share_encoder else teacher
    head = 2 * passages * (a.width + (a.width**2 if model.teacher_pooler else 0))
    pairs = forward(a, *rows["pairs"]) + head
    once = bool(terms & (config.TEACHING | config.TAUGHT) - {"nll_ce_fgm"})
    total += (3 if weights.trains_teacher else 1) * pairs * once
    total += 5 * pairs if weights.nll_ce_fgm else 0  # 2 to find the move (no weight has a gradient there), 3 after it

  if weights.needs_student:
    copies = 2 if weights.needs_twin else 1
    dual_pool = "nll_de" in terms and train.dual_pool == "global"
    dual_pool |= "kl_li_de" in terms and train.late_pool == "global"
    vectors = passages if terms & config.VECTORS else 0
    vectors += queries * passages * (2 if weights.needs_twin else int(dual_pool))
    width = student.width if model.dual_width is None else model.dual_width
    total += 3 * (copies * sum(forward(student, *own) for own in towers) + 2 * vectors * width)
    if model.dual_width is not None and weights.needs_dual:
      total += 3 * copies * 2 * (queries + passages) * student.width * width

  if weights.needs_late:
    width = student.width if model.late_width is None else model.late_width
    if model.late_width is not None:
      tokens = sum(math.prod(own) for own in towers)
      total += 3 * 2 * tokens * student.width * width
    similarity = 2 * data.query_length * data.passage_length * width
    pool = queries * passages if train.late_pool == "global" and terms & {"nll_li", "kl_li_de"} else 0
    total += 3 * similarity * (passages + pool)

  if weights.virt:
    layers = student.layers if model.share_encoder else min(student.layers, teacher.layers)
    total += 3 * passages * layers * 2 * data.query_length * data.passage_length * student.width

  if weights.mlm:
    places = rows["masked"][0] * train.predicted
    total += 3 * (forward(student, *rows["masked"]) + 2 * places * student.width * (student.width + student.vocabulary))

  return total


def mfu(flops: float, seconds: float, devices: int) -> float | None:
  """Model FLOPs utilisation: share of the devices' peak. None on a device whose peak is not known, such as a CPU."""
  chip = CHIPS.get(jax.devices()[0].device_kind)
  return None if chip is None else flops / (seconds * devices * chip.flops)
