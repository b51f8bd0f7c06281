"""Models of random weights in the files of PaddleNLP and RocketQA, and what these models compute, in float64.

The names, shapes, files and formulas are those of the released ERNIE-Search, RocketQA and ERNIE models. Nothing here
knows our encoder: `hidden`, `dual` and `cross` are what a checkpoint that was read is compared with.
"""

import dataclasses
import json
import pickle
import struct
from pathlib import Path

import numpy as np
from scipy.special import erf

Weights = dict[str, np.ndarray]  # float32 under PaddleNLP's names without a prefix; kernels are [in, out]


@dataclasses.dataclass(frozen=True)
class Shape:
  vocabulary: int
  width: int
  layers: int
  heads: int
  inner: int
  positions: int
  types: int
  tasks: int = 0
  activation: str = "gelu"

  def small(self, vocabulary: int, width: int, layers: int) -> "Shape":
    """The same with few numbers."""
    return dataclasses.replace(self, vocabulary=vocabulary, width=width, layers=layers, heads=2, inner=4 * width)


ERNIE_2_BASE = Shape(30522, 768, 12, 12, 3072, 512, 4)  # ERNIE-Search's dual-encoder, RocketQA's English models
ERNIE_2_LARGE = Shape(30522, 1024, 24, 16, 4096, 512, 4)  # ERNIE-Search's cross-encoder
ERNIE_3_BASE = Shape(40000, 768, 12, 12, 3072, 2048, 4, tasks=3)
ERNIE_1_BASE = Shape(18000, 768, 12, 12, 3072, 513, 2, activation="relu")


# ---- Weights -------------------------------------------------------------------------------------------------------


def encoder(shape: Shape, seed: int, *, embedding: float = 0.003, kernel: float = 0.3, pooler: bool = True) -> Weights:
  """Random weights.

  Embeddings so small that the first norm's epsilon counts; kernels so large that attention is far from uniform.
  """
  rng = np.random.default_rng(seed)
  normal = lambda scale, *size: (scale * rng.standard_normal(size, np.float32)).astype(np.float32)
  found: Weights = {}

  def norm(name: str) -> None:
    found[f"{name}.weight"] = 1 + normal(0.1, shape.width)
    found[f"{name}.bias"] = normal(0.1, shape.width)

  def linear(name: str, inputs: int, outputs: int) -> None:
    found[f"{name}.weight"] = normal(kernel, inputs, outputs)
    found[f"{name}.bias"] = normal(0.1, outputs)

  for name, rows in (
    ("word", shape.vocabulary),
    ("position", shape.positions),
    ("token_type", shape.types),
    ("task_type", shape.tasks),
  ):
    if rows:
      found[f"embeddings.{name}_embeddings.weight"] = normal(embedding, rows, shape.width)
  norm("embeddings.layer_norm")
  for i in range(shape.layers):
    layer = f"encoder.layers.{i}"
    for part in ("q", "k", "v", "out"):
      linear(f"{layer}.self_attn.{part}_proj", shape.width, shape.width)
    linear(f"{layer}.linear1", shape.width, shape.inner)
    linear(f"{layer}.linear2", shape.inner, shape.width)
    norm(f"{layer}.norm1")
    norm(f"{layer}.norm2")
  if pooler:
    linear("pooler.dense", shape.width, shape.width)
  return found


def linear(name: str, inputs: int, outputs: int, seed: int, kernel: float = 0.3) -> Weights:
  """A head's kernel and bias."""
  rng = np.random.default_rng(seed)
  weight = kernel * rng.standard_normal((inputs, outputs), np.float32)
  return {f"{name}.weight": weight, f"{name}.bias": rng.standard_normal(outputs, np.float32)}


def masked_language_model(shape: Shape) -> Weights:
  """What pre-training leaves in a file: no model for retrieval reads it."""
  norm = {f"cls.predictions.layer_norm.{part}": np.ones(shape.width, np.float32) for part in ("weight", "bias")}
  bias = {"cls.predictions.decoder_bias": np.zeros(shape.vocabulary, np.float32)}
  return linear("cls.predictions.transform", shape.width, shape.width, 0) | norm | bias


# ---- What they compute ---------------------------------------------------------------------------------------------


def gelu(x: np.ndarray) -> np.ndarray:
  return x * (1 + erf(x / np.sqrt(2))) / 2


def hidden(weights: Weights, shape: Shape, texts: list[tuple[list[int], list[int]]], epsilon: float) -> np.ndarray:
  """Last hidden states [n, L, H] of texts, each its tokens and their types, padded to the longest of them."""
  longest = max(len(tokens) for tokens, _ in texts)
  tokens, types, mask = (np.zeros((len(texts), longest), int) for _ in range(3))
  for i, (own, kinds) in enumerate(texts):
    tokens[i, : len(own)], types[i, : len(own)], mask[i, : len(own)] = own, kinds, 1
  w = lambda name: weights[name].astype(np.float64)
  apply = lambda name, x: x @ w(f"{name}.weight") + w(f"{name}.bias")

  def norm(name: str, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return w(f"{name}.weight") * x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) + w(f"{name}.bias")

  rows = lambda name, which: weights[f"embeddings.{name}_embeddings.weight"][which].astype(np.float64)
  x = rows("word", tokens) + rows("position", np.arange(longest)) + rows("token_type", types)
  if shape.tasks:
    x = x + rows("task_type", 0)
  x = norm("embeddings.layer_norm", x)
  bias = 10000.0 * (mask[:, :, None] * mask[:, None, :] - 1.0)
  size = shape.width // shape.heads
  activation = {"gelu": gelu, "relu": lambda x: np.maximum(x, 0)}[shape.activation]
  for i in range(shape.layers):
    layer = f"encoder.layers.{i}"
    split = lambda x: x.reshape(len(texts), longest, shape.heads, size).transpose(0, 2, 1, 3)
    q, k, v = (split(apply(f"{layer}.self_attn.{part}_proj", x)) for part in "qkv")
    logits = (q * size**-0.5) @ k.transpose(0, 1, 3, 2) + bias[:, None]
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    mixed = (attention @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    x = norm(f"{layer}.norm1", x + apply(f"{layer}.self_attn.out_proj", mixed))
    inner = activation(apply(f"{layer}.linear1", x))
    x = norm(f"{layer}.norm2", x + apply(f"{layer}.linear2", inner))
  return x


def dual(weights: Weights, shape: Shape, texts: list[tuple[list[int], list[int]]], epsilon: float = 1e-5) -> np.ndarray:
  """Dual-encoder vectors [n, H]: the first token's last hidden state, or its linear map if there is one."""
  x = hidden(weights, shape, texts, epsilon)[:, 0]
  if "emb_reduce_linear.weight" in weights:
    x = x @ weights["emb_reduce_linear.weight"].astype(np.float64) + weights["emb_reduce_linear.bias"]
  return x


def cross(
  weights: Weights, shape: Shape, pairs: list[tuple[list[int], list[int]]], *, pooler: bool, epsilon: float = 1e-5
) -> np.ndarray:
  """What a cross-encoder's `classifier` gives, [n, classes]; with the tanh pooler or without it."""
  x = hidden(weights, shape, pairs, epsilon)[:, 0]
  if pooler:
    x = np.tanh(x @ weights["pooler.dense.weight"].astype(np.float64) + weights["pooler.dense.bias"])
  return x @ weights["classifier.weight"].astype(np.float64) + weights["classifier.bias"]


# ---- Texts ---------------------------------------------------------------------------------------------------------

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def query(vocabulary: list[str], words: str) -> tuple[list[int], list[int]]:
  """[CLS] q [SEP] and its types; words that are entries, with spaces between them."""
  own = ["[CLS]", *words.split(), "[SEP]"]
  return [vocabulary.index(word) for word in own], [0] * len(own)


def passage(vocabulary: list[str], title: str, words: str) -> tuple[list[int], list[int]]:
  """[CLS] title [SEP] text [SEP], the text of type 1; without a title [CLS] [SEP] text [SEP]."""
  first, second = ["[CLS]", *title.split(), "[SEP]"], [*words.split(), "[SEP]"]
  return [vocabulary.index(word) for word in first + second], [0] * len(first) + [1] * len(second)


def pair(vocabulary: list[str], asked: str, title: str, words: str) -> tuple[list[int], list[int]]:
  """[CLS] q [SEP] title text [SEP], the second part of type 1."""
  return passage(vocabulary, asked, f"{title} {words}")


# ---- Files ---------------------------------------------------------------------------------------------------------


def settings(shape: Shape, **more) -> dict:
  """A configuration as PaddleNLP has it; it says 1e-12 whatever a model was trained with."""
  return {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": shape.activation,
    "hidden_dropout_prob": 0.1,
    "hidden_size": shape.width,
    "initializer_range": 0.02,
    "intermediate_size": shape.inner,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": shape.positions,
    "num_attention_heads": shape.heads,
    "num_hidden_layers": shape.layers,
    "pad_token_id": 0,
    "pool_act": "tanh",
    "task_id": 0,
    "task_type_vocab_size": 3,
    "type_vocab_size": shape.types,
    "use_task_id": bool(shape.tasks),
    "vocab_size": shape.vocabulary,
  } | more


def save(arrays: Weights, path: Path, protocol: int = 4) -> None:
  """A `.pdparams` file: by protocol 2 of bare arrays, later of (name, array), each with Paddle's table of names."""
  table = {name: f"{name.rpartition('.')[0].rpartition('.')[2]}_{i}.w_0" for i, name in enumerate(arrays)}
  wrap = (lambda name, x: x) if protocol == 2 else (lambda name, x: (table[name], x))
  with open(path, "wb") as file:
    pickle.dump(
      {name: wrap(name, x) for name, x in arrays.items()} | {"StructuredToParameterName@@": table}, file, protocol
    )


def paddlenlp(
  folder: Path, arrays: Weights, about: dict, vocabulary: list[str], *, old: bool = False, numbered: bool = False
) -> Path:
  """A folder that PaddleNLP saved; `old` is before 2.5; `numbered` lines of the vocabulary stand in any order."""
  folder.mkdir(parents=True)
  save(arrays, folder / "model_state.pdparams", 2 if old else 4)
  if old:
    inner = {name: x for name, x in about.items() if name != "layer_norm_eps"} | {"init_class": "ErnieModel"}
    about = {"init_args": [inner], "output_emb_size": 0, "num_classes": 2, "init_class": "ErnieEncoder"}
  else:
    about = about | {"architectures": ["ErnieModel"], "model_type": "ernie", "paddlenlp_version": None}
  (folder / ("model_config.json" if old else "config.json")).write_text(json.dumps(about))
  (folder / "vocab.txt").write_text(lines(vocabulary, numbered), encoding="utf-8")
  return folder


def lines(vocabulary: list[str], numbered: bool) -> str:
  own = [f"{word}\t{i}" for i, word in enumerate(vocabulary)][::-1] if numbered else vocabulary
  return "".join(f"{line}\n" for line in own)


STATIC = {
  "embeddings.word_embeddings.weight": "word_embedding",
  "embeddings.position_embeddings.weight": "pos_embedding",
  "embeddings.token_type_embeddings.weight": "sent_embedding",
  "embeddings.task_type_embeddings.weight": "task_embedding",
  "embeddings.layer_norm.weight": "pre_encoder_layer_norm_scale",
  "embeddings.layer_norm.bias": "pre_encoder_layer_norm_bias",
}
LAYER = {
  **{
    f"self_attn.{part}_proj.{kind}": f"multi_head_att_{name}_fc.{kind[0]}_0"
    for part, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output"))
    for kind in ("weight", "bias")
  },
  **{f"linear{n + 1}.{kind}": f"ffn_fc_{n}.{kind[0]}_0" for n in (0, 1) for kind in ("weight", "bias")},
  "norm1.weight": "post_att_layer_norm_scale",
  "norm1.bias": "post_att_layer_norm_bias",
  "norm2.weight": "post_ffn_layer_norm_scale",
  "norm2.bias": "post_ffn_layer_norm_bias",
}


def static(weights: Weights, prefix: str) -> Weights:
  """The same under the names of RocketQA's variables; the pooler's have no prefix."""
  found: Weights = {}
  for name, x in weights.items():
    kind = name.rpartition(".")[2]
    if name in STATIC:
      found[prefix + STATIC[name]] = x
    elif name.startswith("encoder.layers."):
      _, _, i, part = name.split(".", 3)
      found[f"{prefix}encoder_layer_{i}_{LAYER[part]}"] = x
    elif name.startswith("pooler."):
      found[f"pooled_fc.{kind[0]}_0"] = x
    elif name.startswith("classifier."):
      found[f"{prefix}_cls_out_{kind[0]}"] = x
  return found


def variable(x: np.ndarray) -> bytes:
  """A LoDTensor as Paddle 1.x saves it: versions, no levels, number type and shape as a protobuf message, numbers."""
  kind = {"float32": 5, "float64": 6, "int64": 3, "int32": 2}[x.dtype.name]

  def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

  message = b"\x08" + varint(kind) + b"".join(b"\x10" + varint(n) for n in x.shape)
  return struct.pack("<IQIi", 0, 0, 0, len(message)) + message + x.tobytes()


def leftovers(variables: Weights) -> Weights:
  """What Adam, its schedule and mixed precision leave beside the weights."""
  found: Weights = {"learning_rate_0": np.zeros(1, np.float32), "@LR_DECAY_COUNTER@": np.zeros(1, np.int64)}
  found |= {name: np.ones(1, np.float32) for name in ("loss_scaling_0", "num_bad_steps_0", "num_good_steps_0")}
  for name, x in variables.items():
    found |= {f"{name}_{part}_0": np.zeros_like(x) for part in ("moment1", "moment2")}
    found |= {f"{name}_beta{n}_pow_acc_0": np.ones(1, np.float32) for n in (1, 2)}
  return found


def rocketqa(folder: Path, variables: Weights, shape: Shape, vocabulary: list[str], **about) -> Path:
  """A folder that RocketQA's package downloads and trains; `about` goes into its config.json."""
  (folder / "step_36000").mkdir(parents=True)
  for name, x in (variables | leftovers(variables)).items():
    (folder / "step_36000" / name).write_bytes(variable(x))
  chinese = shape.activation == "relu"
  keys = ("layer_norm_eps", "pad_token_id", "pool_act", "task_id", "use_task_id", "intermediate_size")
  encoder = {name: x for name, x in settings(shape, task_type_vocab_size=16).items() if name not in keys}
  if not chinese:
    encoder["sent_type_vocab_size"] = encoder.pop("type_vocab_size")
  (folder / "ernie_config.json").write_text(json.dumps(encoder))
  (folder / "vocab.txt").write_text(lines(vocabulary, chinese), encoding="utf-8")
  own = {
    "model_conf_path": "ernie_config.json",
    "model_vocab_path": "vocab.txt",
    "model_checkpoint_path": "step_36000",
    "for_cn": chinese,
  }
  (folder / "config.json").write_text(json.dumps(own | about))
  return folder
