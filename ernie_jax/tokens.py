"""Tokenizer and token store: each text is tokenised once, into a memory-mapped file of integers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ernie_jax import columns, config
from ernie_jax.columns import Ragged
from ernie_jax.config import UserError, first_line
from ernie_jax.progress import Progress, say

if TYPE_CHECKING:
  import tokenizers

  from ernie_jax.datasets import Dataset

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MARKERS = ("[unused0]", "[unused1]")  # ColBERT's, of queries and of passages
BLOCK = 4096  # texts tokenised at once, by all cores
SAMPLE = 500_000  # texts that a vocabulary is built from, at most


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A WordPiece tokenizer with BERT's special tokens; adds none of them itself."""

  backend: tokenizers.Tokenizer
  pad: int
  cls: int
  sep: int
  mask: int
  special: tuple[int, ...]  # no text of its own holds them

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
    backend.encode_special_tokens = True  # a text that says "[SEP]" is a text
    markers = [i for token in MARKERS if (i := backend.token_to_id(token)) is not None]
    special = tuple(sorted({*ids.values(), *markers}))
    return cls(backend, ids["[PAD]"], ids["[CLS]"], ids["[SEP]"], ids["[MASK]"], special)

  @classmethod
  def load(cls, directory: Path) -> Tokenizer:
    """From `tokenizer.json`, or `vocab.txt` (with `tokenizer_config.json` if there is one); or a vocabulary file."""
    if directory.is_file():
      return cls.of_vocabulary(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
      raise UserError(f"{directory}: no tokenizer.json and no vocab.txt; name a complete checkpoint directory")
    if not (directory / "tokenizer.json").is_file():
      settings = _settings(directory / "tokenizer_config.json")
      kind = settings.get("tokenizer_class", settings.get("init_class", ""))
      if not settings or str(kind).startswith("Ernie"):  # PaddleNLP's name for BERT's
        return cls.of_vocabulary(directory / "vocab.txt", lower=settings.get("do_lower_case") is not False)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises to install PyTorch
    import transformers

    try:
      backend = transformers.AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
    except Exception as error:
      raise UserError(f"{directory}: the tokenizer cannot be read ({first_line(error)})") from error
    return cls.wrap(backend, str(directory))

  @classmethod
  def of_vocabulary(cls, path: Path, lower: bool = True) -> Tokenizer:
    """From lines with a token, or with `token TAB number` as ERNIE's first Chinese models have them."""
    try:
      lines = path.read_text(encoding="utf-8").split("\n")
      numbered = enumerate(line.rstrip("\r").split("\t") for line in lines)
      ids = {own[0]: int(own[1]) if own[1:] else i for i, own in numbered if own != [""]}
    except OSError as error:
      raise UserError(f"{path}: cannot be read ({error.strerror}); name a complete checkpoint directory") from error
    except ValueError as error:
      raise UserError(f"{path}: not a vocabulary ({first_line(error)}); download the checkpoint again") from error
    from tokenizers import models

    return cls.wrap(_around(models.WordPiece(ids, unk_token="[UNK]"), lower), str(path))

  @classmethod
  def train(cls, texts: Sequence[str], size: int) -> Tokenizer:
    """A lower-casing WordPiece vocabulary of at most `size` entries built from the texts, evenly chosen `SAMPLE`."""
    from tokenizers import models, trainers

    texts = texts[:: -(-len(texts) // SAMPLE) or 1]
    # The trainer numbers continuing letters (##a) in an order that changes from run to run, and breaks ties by number:
    # numbered beforehand, the same corpus gives the same vocabulary.
    draft = _around(models.WordPiece(unk_token="[UNK]"))
    split = lambda text: draft.pre_tokenizer.pre_tokenize_str(draft.normalizer.normalize_str(text))
    inner = sorted({f"##{letter}" for text in texts for word, _ in split(text) for letter in word[1:]})
    trainer = trainers.WordPieceTrainer(
      vocab_size=size, special_tokens=[*SPECIAL, *MARKERS, *inner], show_progress=False
    )
    draft.train_from_iterator(texts, trainer)
    backend = _around(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    backend.add_special_tokens([*SPECIAL, *MARKERS])
    return cls.wrap(backend, "vocabulary built from the corpus")

  def __len__(self) -> int:
    return 1 + max(self.backend.get_vocab().values())  # a file with a line twice leaves a gap in the numbers

  def markers(self) -> tuple[int, int]:
    """Of queries and of passages (`data.markers`); `UserError` if the vocabulary has none."""
    query, passage = (self.backend.token_to_id(token) for token in MARKERS)
    if query is None or passage is None:
      raise UserError(f"data.markers=True: the vocabulary lacks {' and '.join(MARKERS)}; set it to False")
    return query, passage

  def continues(self) -> np.ndarray:
    """[V] bool: which tokens continue a word (##ing). A character of its own, as in Chinese, is a word."""
    found = np.zeros(len(self), bool)
    found[[i for token, i in self.backend.get_vocab().items() if token.startswith("##")]] = True
    return found

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


def _settings(path: Path) -> dict:
  """What a tokenizer_config.json says; nothing if there is none."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path}: the tokenizer cannot be read ({first_line(error)})") from error
  if not isinstance(found, dict):
    raise UserError(f"{path}: the tokenizer cannot be read (it holds no settings)")
  return found


def _around(model: tokenizers.models.WordPiece, lower: bool = True) -> tokenizers.Tokenizer:
  """BERT's tokenizer around a vocabulary."""
  import tokenizers
  from tokenizers import decoders, normalizers, pre_tokenizers

  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  return backend


def digest(tokenizer: Tokenizer) -> str:
  """16 hex digits of everything that a tokenizer does here, the same before and after it was saved."""
  settings = json.loads(tokenizer.backend.to_str())
  settings.pop("post_processor")  # which adds special tokens: loaders set it, and it is not used
  return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def in_memory(texts: Sequence[str], tokenizer: Tokenizer) -> Ragged:
  """The tokens of a few texts, such as the queries that a user types."""
  return columns.ragged(tokenizer.encode(texts))


def store(dataset: Dataset, split: str, tokenizer: Tokenizer, settings: config.Data) -> Ragged:
  """Token ids, without special tokens, of passages ("corpus"), their titles ("titles") or the queries of a split.

  Written once into the cache, and found there by the texts, the tokenizer and the template. With titles apart
  (`template="rocketqa"`) a passage is title [SEP] text.
  """
  apart = split == "corpus" and settings.template == "rocketqa"
  corpus = dataset.corpus
  if split == "corpus":
    parts: list[Sequence[str]] = [corpus.texts, corpus.titles] if apart else [corpus.passages]
  else:
    parts = [corpus.titles if split == "titles" else dataset.queries[split].texts]
  blocks = ([list(part[begin : begin + BLOCK]) for part in parts] for begin in range(0, len(parts[0]), BLOCK))
  said = f"{dataset.fingerprint} {split} {digest(tokenizer)} {'title [SEP] text' if apart else 'text'}"
  if split == "train" and settings.train_queries is not None:
    said += f" {settings.train_queries} of them"
  return _kept(said, lambda: (len(parts[0]), blocks), tokenizer, settings)


def store_lines(paths: Sequence[Path], tokenizer: Tokenizer, settings: config.Data) -> Ragged:
  """Token ids of text files (UTF-8; also .gz, .zst), a text a line; lines without any are left out. In the cache, too.

  `UserError` with file and line for what is no UTF-8, unless `data.skip_bad` allows it.
  """
  from ernie_jax.datasets import files  # with TFDS, which inference does without
  from ernie_jax.datasets.rows import blocks

  def read() -> tuple[int, Iterator[list[list[str]]]]:
    def lines(bad: files.Bad) -> Iterator[str]:
      return (line for path in paths for _, line in files.lines(path, bad) if line.strip())

    bad = files.Bad(settings.skip_bad)
    count = sum(1 for _ in lines(bad))  # the whole is looked at before anything is written
    if bad.skipped:
      say(f"  {paths[0]}{' and others' if paths[1:] else ''}: skipped {bad}")
    return count, ([block] for block in blocks(lines(files.Bad(settings.skip_bad)), BLOCK))

  return _kept(f"{files.signature(paths)} lines {digest(tokenizer)}", read, tokenizer, settings)


def _kept(
  said: str,
  read: Callable[[], tuple[int, Iterator[list[list[str]]]]],
  tokenizer: Tokenizer,
  settings: config.Data,
) -> Ragged:
  """The column that was written for what is `said`, or is now: of so many texts, from blocks of them."""
  fingerprint = hashlib.sha256(said.encode()).hexdigest()[:16]
  directory = Path(settings.cache).expanduser() / "tokens" / fingerprint
  if (found := columns.matching(directory, fingerprint=fingerprint)) is not None:
    return found
  with columns.alone(directory.parent):
    if (found := columns.matching(directory, fingerprint=fingerprint)) is not None:  # another process was faster
      return found
    for leftover in directory.parent.glob("*.writing-*"):
      shutil.rmtree(leftover)
    return write(directory, *read(), tokenizer, fingerprint)


def write(
  directory: Path, count: int, blocks: Iterator[list[list[str]]], tokenizer: Tokenizer, fingerprint: str
) -> Ragged:
  """Tokenises blocks of texts (or texts and their titles) into a column, while the next block is read."""
  sep = np.array([tokenizer.sep])
  try:
    with (
      columns.Writer(directory, np.uint16 if len(tokenizer) <= 2**16 else np.uint32) as writer,
      Progress("tokenise", count, "texts") as bar,
      concurrent.futures.ThreadPoolExecutor(1) as reader,
    ):
      coming = reader.submit(next, blocks, None)
      while (block := coming.result()) is not None:
        coming = reader.submit(next, blocks, None)
        for own, *title in zip(*map(tokenizer.encode, block)):
          writer.append(np.concatenate([*title, sep, own]) if title else own)
        bar.advance(len(block[0]))
      writer.close(fingerprint=fingerprint)
  except OSError as error:
    raise UserError(f"{directory}: cannot be written ({error.strerror or error}); set data.cache") from error
  found = columns.matching(directory, fingerprint=fingerprint)
  if found is None:
    raise UserError(f"{directory}: changed while it was written; delete it, and it is made anew")
  return found
