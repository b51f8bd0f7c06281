"""Parameters by our names, by Hugging Face's, by PaddleNLP's and by RocketQA's."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

Arrays = dict[str, np.ndarray]

# Our name -> Hugging Face's; `{}` is the layer's number. Kernels are stored transposed there, and stacked over layers
# here.
EMBEDDINGS = {
  "word.embedding": "embeddings.word_embeddings.weight",
  "position.embedding": "embeddings.position_embeddings.weight",
  "type.embedding": "embeddings.token_type_embeddings.weight",
  "task.embedding": "embeddings.task_type_embeddings.weight",
  "norm.scale": "embeddings.LayerNorm.weight",
  "norm.bias": "embeddings.LayerNorm.bias",
}
LAYER = {
  f"layers.{ours}.{part}": f"encoder.layer.{{}}.{theirs}.{'bias' if part == 'bias' else 'weight'}"
  for ours, theirs, first in (
    ("query", "attention.self.query", "kernel"),
    ("key", "attention.self.key", "kernel"),
    ("value", "attention.self.value", "kernel"),
    ("output", "attention.output.dense", "kernel"),
    ("attention_norm", "attention.output.LayerNorm", "scale"),
    ("up", "intermediate.dense", "kernel"),
    ("down", "output.dense", "kernel"),
    ("output_norm", "output.LayerNorm", "scale"),
  )
  for part in (first, "bias")
}
# Parts that some checkpoints have beside the encoder.
HEADS = {
  "pooler": "pooler.dense",  # of a cross-encoder
  "head": "classifier",  # its logit
  "projection": "linear",  # of late interaction, as ColBERT calls it
  "reduction": "emb_reduce_linear",  # of dual-encoder vectors, as PaddleNLP calls it
}
# BERT's head of masked language modelling, in post-training.
MASKED = {
  "dense.kernel": "cls.predictions.transform.dense.weight",
  "dense.bias": "cls.predictions.transform.dense.bias",
  "norm.scale": "cls.predictions.transform.LayerNorm.weight",
  "norm.bias": "cls.predictions.transform.LayerNorm.bias",
  "bias": "cls.predictions.bias",
}
# Parts of other tasks, and buffers.
IGNORED = re.compile(
  r"(pooler|classifier|cls|lm_head|linear|emb_reduce_linear)\.|mask_lm_|embeddings\.(position|token_type)_ids$"
)
# PaddleNLP's names -> Hugging Face's.
PADDLE = (
  (r"^embeddings\.layer_norm\.", "embeddings.LayerNorm."),
  (r"^encoder\.layers\.", "encoder.layer."),
  (r"\.self_attn\.q_proj\.", ".attention.self.query."),
  (r"\.self_attn\.k_proj\.", ".attention.self.key."),
  (r"\.self_attn\.v_proj\.", ".attention.self.value."),
  (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
  (r"\.norm1\.", ".attention.output.LayerNorm."),
  (r"\.linear1\.", ".intermediate.dense."),
  (r"\.linear2\.", ".output.dense."),
  (r"\.norm2\.", ".output.LayerNorm."),
)
# RocketQA's files, one for each variable -> Hugging Face's names.
ROCKETQA = (
  (r"^word_embedding$", "embeddings.word_embeddings.weight"),
  (r"^pos_embedding$", "embeddings.position_embeddings.weight"),
  (r"^sent_embedding$", "embeddings.token_type_embeddings.weight"),
  (r"^task_embedding$", "embeddings.task_type_embeddings.weight"),
  (r"^pre_encoder_layer_norm_", "embeddings.LayerNorm."),
  (r"^encoder_layer_(\d+)_", r"encoder.layer.\1."),
  (r"\.multi_head_att_(query|key|value)_fc\.", r".attention.self.\1."),
  (r"\.multi_head_att_output_fc\.", ".attention.output.dense."),
  (r"\.post_att_layer_norm_", ".attention.output.LayerNorm."),
  (r"\.ffn_fc_0\.", ".intermediate.dense."),
  (r"\.ffn_fc_1\.", ".output.dense."),
  (r"\.post_ffn_layer_norm_", ".output.LayerNorm."),
  (r"^pooled_fc\.", "pooler.dense."),
  (r"^_?cls_out_", "classifier."),
  (r"\.(w_0|w|scale)$", ".weight"),
  (r"\.(b_0|b)$", ".bias"),
)


def transposed(name: str) -> bool:
  return name.endswith(".weight") and "embeddings" not in name and "LayerNorm" not in name


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
  for pattern, replacement in rules:
    name = re.sub(pattern, replacement, name)
  return name


def turned(name: str, x: np.ndarray) -> np.ndarray:
  """Kernels are [in, out] here and in Paddle, [out, in] in Hugging Face's files."""
  return x.T if transposed(name) else x


def released(encoder: Arrays) -> Arrays:
  """The encoder's arrays under Hugging Face's names: `pretrained` reads them back."""
  found = {name: encoder[ours] for ours, name in EMBEDDINGS.items() if ours in encoder}
  for ours, name in LAYER.items():
    found |= {name.format(i): x for i, x in enumerate(encoder[ours])}
  return {name: np.ascontiguousarray(turned(name, x)) for name, x in found.items()}
