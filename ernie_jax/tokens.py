"""Tokenizer and token store: each text is tokenised once, into a memory-mapped file of integers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ernie_jax import columns, config
from ernie_jax.config import UserError, first_line

if TYPE_CHECKING:
  import tokenizers

  from ernie_jax.datasets import Dataset

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A WordPiece tokenizer with BERT's special tokens; adds none of them itself."""

  backend: tokenizers.Tokenizer
  pad: int
  cls: int
  sep: int
  special: tuple[int, ...]

  @classmethod
  def wrap(cls, backend: tokenizers.Tokenizer, where: str) -> Tokenizer:
    base = backend.get_vocab_size(with_added_tokens=False)  # loaders append what a vocabulary lacks
    found = {token: backend.token_to_id(token) for token in SPECIAL}
    ids = {token: i for token, i in found.items() if i is not None and i < base}
    missing = [token for token in SPECIAL if token not in ids]
    if missing:
      raise UserError(f"{where}: the tokenizer lacks {', '.join(missing)}; a BERT or ERNIE tokenizer is needed")
    backend.no_truncation()  # released tokenizer.json files often carry the trainer's settings
    backend.no_padding()
    return cls(backend, ids["[PAD]"], ids["[CLS]"], ids["[SEP]"], tuple(sorted(ids.values())))

  @classmethod
  def load(cls, directory: Path) -> Tokenizer:
    """From `tokenizer.json`, or `vocab.txt` (with `tokenizer_config.json` if there is one)."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
      raise UserError(f"{directory}: no tokenizer.json and no vocab.txt; name a complete checkpoint directory")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install PyTorch
    import transformers

    try:
      backend = transformers.AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
    except Exception as error:
      raise UserError(f"{directory}: the tokenizer cannot be read ({first_line(error)})") from error
    return cls.wrap(backend, str(directory))

  @classmethod
  def train(cls, texts: Sequence[str], size: int) -> Tokenizer:
    """A lower-casing WordPiece vocabulary of at most `size` entries built from the texts."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    def make(model: models.WordPiece) -> tokenizers.Tokenizer:
      backend = tokenizers.Tokenizer(model)
      backend.normalizer = normalizers.BertNormalizer(lowercase=True)
      backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
      backend.decoder = decoders.WordPiece()
      return backend

    # The trainer numbers continuing letters (##a) in an order that changes from run to run, and breaks ties by number:
    # numbered beforehand, the same corpus gives the same vocabulary.
    draft = make(models.WordPiece(unk_token="[UNK]"))
    split = lambda text: draft.pre_tokenizer.pre_tokenize_str(draft.normalizer.normalize_str(text))
    inner = sorted({f"##{letter}" for text in texts for word, _ in split(text) for letter in word[1:]})
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL, *inner], show_progress=False)
    draft.train_from_iterator(texts, trainer)
    backend = make(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    backend.add_special_tokens(list(SPECIAL))
    return cls.wrap(backend, "vocabulary built from the corpus")

  def __len__(self) -> int:
    return self.backend.get_vocab_size()

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, without special tokens."""
    return [np.array(e.ids, np.int32) for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

  def save(self, directory: Path) -> None:
    """Writes `tokenizer.json` and the two lines of `tokenizer_config.json` that other tools look for."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = {"tokenizer_class": "BertTokenizerFast", "mask_token": "[MASK]"} | names
    config.write(directory / "tokenizer_config.json", json.dumps(settings, indent=2))
    config.write(directory / "tokenizer.json", self.backend.to_str(pretty=True))


def digest(tokenizer: Tokenizer) -> str:
  """16 hex digits of everything that a tokenizer does."""
  return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Store:
  """N texts as one flat array of token ids: text i is `tokens[offsets[i]:offsets[i + 1]]`."""

  tokens: np.ndarray
  offsets: np.ndarray

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.tokens[self.offsets[row] : self.offsets[row + 1]]

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each text, without special tokens."""
    return np.diff(self.offsets)

  def take(self, rows: np.ndarray) -> Store:
    """Some texts, in memory."""
    return _joined([self[row] for row in rows])


def _joined(pieces: Sequence[np.ndarray]) -> Store:
  return Store(np.concatenate([np.zeros(0, np.int32), *pieces]), np.cumsum([0] + [len(p) for p in pieces]))


def in_memory(texts: Sequence[str], tokenizer: Tokenizer) -> Store:
  """A store of a few texts, such as the queries that a user types."""
  return _joined(tokenizer.encode(texts))


def build(directory: Path, texts: Sequence[str], tokenizer: Tokenizer, block: int = 4096) -> Store:
  """The store of `texts` under `directory`: reused when texts and tokenizer are the same, else made anew."""
  digest = hashlib.sha256(tokenizer.backend.to_str().encode())
  for text in texts:
    digest.update(text.encode() + b"\0")
  fingerprint = digest.hexdigest()[:16]
  if not _matches(directory, fingerprint):
    temporary = directory.with_name(f"{directory.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    lengths = []
    with open(temporary / "tokens.bin", "wb") as file:
      for start in range(0, len(texts), block):
        for piece in tokenizer.encode(texts[start : start + block]):
          lengths.append(len(piece))
          file.write(piece.astype(dtype).tobytes())
    np.save(temporary / "offsets.npy", np.cumsum([0, *lengths]))
    (temporary / "store.json").write_text(json.dumps({"fingerprint": fingerprint, "dtype": np.dtype(dtype).name}))
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
  dtype = json.loads((directory / "store.json").read_text())["dtype"]
  size = (directory / "tokens.bin").stat().st_size
  tokens = np.memmap(directory / "tokens.bin", dtype=dtype, mode="r") if size else np.zeros(0, dtype)
  return Store(tokens, np.load(directory / "offsets.npy"))


def store(dataset: Dataset, split: str, tokenizer: Tokenizer, settings: config.Data) -> columns.Ragged:
  """Token ids of the passages ("corpus") or the queries of a split, without special tokens, memory-mapped in the cache.

  Made once for a data set and a tokenizer.
  """
  cache = Path(settings.cache).expanduser() / "tokens"
  directory = cache / f"{dataset.fingerprint}-{digest(tokenizer)}" / split
  texts = dataset.corpus.passages if split == "corpus" else dataset.queries[split].texts
  if (found := columns.matching(directory, rows=len(texts))) is None:
    with columns.Writer(directory, np.uint16 if len(tokenizer) <= 2**16 else np.uint32) as writer:
      for start in range(0, len(texts), 4096):
        for piece in tokenizer.encode(texts[start : start + 4096]):
          writer.append(piece)
      writer.close(rows=len(texts))
    found = columns.matching(directory, rows=len(texts))
  assert found is not None
  return found


def _matches(directory: Path, fingerprint: str) -> bool:
  """Whether a whole store with this fingerprint is there; a cut file does not count."""
  try:
    meta = json.loads((directory / "store.json").read_text())
    offsets = np.load(directory / "offsets.npy")
    size = (directory / "tokens.bin").stat().st_size
    return meta["fingerprint"] == fingerprint and size == offsets[-1] * np.dtype(meta["dtype"]).itemsize
  except (OSError, ValueError, KeyError, EOFError):
    return False
