"""Every setting of ernie_jax, its default and its check, in one place.

A configuration file (`configs/*.py`) holds `config = Config(...)` or a `dataclasses.replace` of another one.
Where the paper is silent, the choice made here is a field, and its comment says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args, get_origin, get_type_hints


class UserError(Exception):
  """Something the user can put right. Shown as one line; the command ends with exit code 2."""


class Interrupted(KeyboardInterrupt):
  """Ctrl-C or SIGTERM at a point where everything is saved. The command ends with exit code 128 + `signal`."""

  def __init__(self, text: str, number: int):
    super().__init__(text)
    self.signal = number


def first_line(error: Exception) -> str:
  """An error's first line, cut to 120 characters."""
  text = str(error).strip().splitlines() or [type(error).__name__]
  return text[0][:120]


def check_choices(settings: Any, prefix: str) -> None:
  """Checks every field of a dataclass whose type is a `Literal`: a file may say anything."""
  for field, kind in get_type_hints(type(settings)).items():
    if get_origin(kind) is Literal:
      known = get_args(kind)
      check(
        getattr(settings, field) in known, prefix + field, getattr(settings, field), f"known are {', '.join(known)}"
      )


def check(condition: bool, field: str, value: Any, remedy: str) -> None:
  """Raises a `UserError` that names field, value and remedy unless `condition` holds."""
  if not condition:
    raise UserError(f"{field}={value!r}: {remedy}")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}"""
  pairs: dict[str, Any] = {}
  for name, value in tree.items():
    pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return pairs


def must_be_new(folder: Path) -> None:
  """`UserError` unless `--output` can be made, or is an empty folder."""
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(f"--output {folder}: is there; name a new folder")


def write(path: Path, content: bytes | str | Iterable[str]) -> None:
  """Writes a whole file or none. `UserError` if it cannot."""
  chunks = [content] if isinstance(content, bytes | str) else content
  with writing(path) as file:
    file.writelines(chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
  """A file with a temporary name in the same folder, renamed when it is whole. `UserError` if it cannot be written."""
  temporary = path.with_name(f"{path.name}.writing-{os.getpid()}")
  try:
    if path.is_dir():  # now, not when all is written
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with open(temporary, "wb") as file:
      yield file
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()


DataName = Literal["docstrings", "jsonl", "msmarco", "dpr", "beir", "dureader", "squad"]


@dataclasses.dataclass(frozen=True)
class Data:
  """Which texts, and how much of each is read."""

  name: DataName = "docstrings"
  folder: str = ""  # where the files lie: all data sets but docstrings
  packages: tuple[str, ...] = (
    "python",
    "numpy",
    "scipy",
    "jax",
    "jaxlib",
    "flax",
    "optax",
  )  # docstrings: whose
  cache: str = "~/.cache/ernie_jax"  # prepared data sets and downloaded weights, shared by all runs
  skip_bad: int = 0  # most bad lines that are left out and counted; one more is an error
  # So many of the training queries, drawn alike in every run, the few among the more; None: all.
  train_queries: int | None = None
  query_length: int = 32  # tokens, special ones included
  passage_length: int = 128
  template: Literal["bert", "rocketqa"] = "bert"  # a passage: "title: text"; or title [SEP] text, the text of type 1
  markers: bool = False  # ColBERT: [unused0] after a query's [CLS], [unused1] after a passage's
  augment: bool = False  # ColBERT: queries filled up with [MASK], which late interaction scores and no token reads
  # Tokens of a row that holds several texts, in training; twice, ... as many where a text may have more, as pairs do.
  # Queries stand beside passages, where `model.tied`. None: a row for each text.
  pack: int | None = None

  def __post_init__(self):
    check_choices(self, "data.")
    check(
      bool(self.folder) == (self.name != "docstrings"),
      "data.folder",
      self.folder,
      "is where the files of data.name lie: needed for every data set but docstrings, which has none",
    )
    check(len(self.packages) > 0, "data.packages", self.packages, "name at least one package, such as python")
    check(self.skip_bad >= 0, "data.skip_bad", self.skip_bad, "must be 0 or more")
    count = self.train_queries
    check(count is None or count >= 1, "data.train_queries", count, "must be at least 1, or None for all")
    for field in ("query_length", "passage_length"):
      check(getattr(self, field) >= 4, f"data.{field}", getattr(self, field), "needs at least 4 tokens")
    check(self.pack is None or self.pack >= 1, "data.pack", self.pack, "use 128 to 512 tokens, or None for no packing")

  @property
  def pair_length(self) -> int:
    """A query and a passage share one [SEP] and one [CLS]: nothing is cut off when both are joined."""
    return self.query_length + self.passage_length - 1

  def fits(self, a: Architecture) -> None:
    """`UserError` if an encoder has too few positions."""
    if self.pair_length > a.positions:
      raise UserError(
        f"data.passage_length={self.passage_length}: with the query a pair has {self.pair_length} tokens, the encoder "
        f"has {a.positions} positions; shorten it"
      )


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Shape of a BERT or ERNIE encoder. Read from the checkpoint; given here only for a start from scratch."""

  vocabulary: int = 8192  # from scratch: the size of the WordPiece vocabulary built from the corpus
  width: int = 256  # H
  layers: int = 4
  heads: int = 4
  inner: int = 1024
  positions: int = 512
  types: int = 2
  tasks: int = 0  # ERNIE's task type embeddings; 0: none
  activation: Literal["gelu", "relu"] = "gelu"  # gelu is the exact one, with erf
  epsilon: float = 1e-12
  dropout: float = 0.1
  attention_dropout: float = 0.1
  special: tuple[int, ...] = ()  # ids of [CLS], [SEP], ...: filled in from the tokenizer

  def __post_init__(self):
    check_choices(self, "architecture.")
    check(self.width % self.heads == 0, "architecture.heads", self.heads, f"must divide width={self.width}")
    check(self.layers >= 1, "architecture.layers", self.layers, "needs at least 1 layer")
    for field in ("dropout", "attention_dropout"):
      check(0 <= getattr(self, field) < 1, f"architecture.{field}", getattr(self, field), "must lie in [0, 1)")


PRODUCTS = {"float32": "float32", "mixed": "bfloat16", "bfloat16": "bfloat16"}  # operands of matrix products
STREAM = {"float32": "float32", "mixed": "float32", "bfloat16": "bfloat16"}  # what lies between them


@dataclasses.dataclass(frozen=True)
class Model:
  """Student and teacher (METHOD: three scorers)."""

  start: str = ""  # checkpoint: a directory, a run, a hub id; empty: from scratch, with a vocabulary from the corpus
  start_layers: tuple[int, ...] = ()  # of the checkpoint, from 0, for a smaller student: 0 1 2, or 1 3 5; empty: all
  scratch: Architecture = Architecture()
  pooling: Literal["cls", "mean"] = "cls"  # the paper's family reads the first token
  cosine: bool = False  # normalise dual-encoder vectors; then set loss.temperature.dual to about 0.05
  dual_width: int | None = None  # of dual-encoder vectors, by a linear map (ERNIE-Search's emb_reduce_linear); None: H
  late_width: int | None = 128  # D of late interaction; None uses the hidden states themselves
  tied: bool = True  # one encoder for queries and passages
  teacher_start: str = ""  # the cross-encoder's checkpoint; empty: as the student's
  teacher_scratch: Architecture | None = None  # the cross-encoder's shape without a checkpoint; None: student's
  share_encoder: bool = False  # the cross-encoder uses the student's encoder
  teacher_from_student: bool = False  # before its warm-up the cross-encoder's encoder becomes a copy of the student's
  teacher_pooler: bool = True  # tanh pooler before the logit (ERNIE-Search); False: raw first token (RocketQAv2)
  dropout: float | None = None  # hidden and attention dropout; None: as the checkpoint says
  # Of the encoders' products and what flows between them; all else is float32. mixed: products of bfloat16 operands,
  # summed in float32, and float32 between them: for a CPU with AMX, as fast as bfloat16 there and nearer to float32.
  dtype: Literal["float32", "bfloat16", "mixed"] = "float32"
  scan: bool = True  # loop over layers in the compiled program; False: faster, slower to compile
  remat: bool = False  # recompute activations in the backward pass: less memory, a third more work

  def __post_init__(self):
    check_choices(self, "model.")
    for field in ("dual_width", "late_width"):
      width = getattr(self, field)
      check(width is None or width > 0, f"model.{field}", width, "must be at least 1, or None for the encoder's own")
    check(self.dropout is None or 0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")
    check(
      not self.start_layers or bool(self.start),
      "model.start_layers",
      self.start_layers,
      "are of the checkpoint that model.start names, and there is none: use model.scratch.layers",
    )
    check(
      not (self.share_encoder and self.teacher_start),
      "model.teacher_start",
      self.teacher_start,
      "a shared encoder has no checkpoint of its own: drop it, or set model.share_encoder=False",
    )
    check(
      not (self.share_encoder and self.teacher_scratch),
      "model.teacher_scratch",
      self.teacher_scratch,
      "a shared encoder has no shape of its own: drop it, or set model.share_encoder=False",
    )
    check(
      not (self.teacher_from_student and (self.share_encoder or self.teacher_start or self.teacher_scratch)),
      "model.teacher_from_student",
      True,
      "the cross-encoder begins as the student's encoder: drop share_encoder, teacher_start and teacher_scratch",
    )


TEACHING = frozenset({"nll_ce", "nll_ce_fgm", "kl_listwise", "kl_bidirectional"})  # send the cross-encoder a gradient
TAUGHT = frozenset({"kl_ce_li", "kl_ce_de", "kl_attention", "margin_mse", "virt"})  # ask for it, and send none
# Compare dual-encoder vectors.
VECTORS = frozenset({"nll_de", "kl_li_de", "kl_ce_de", "margin_mse", "kl_listwise", "kl_bidirectional"})


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weight of each loss term; a term of weight 0 is not traced. The paper weighs all its terms 1; peers' follow."""

  nll_ce: float = 1.0
  nll_li: float = 1.0
  nll_de: float = 1.0
  kl_ce_li: float = 1.0
  kl_li_de: float = 1.0
  kl_ce_de: float = 1.0
  kl_attention: float = 1.0
  dualreg_query: float = 1.0
  dualreg_passage: float = 1.0
  mlm: float = 0.0  # masked language modelling on the corpus: post-training
  nll_ce_fgm: float = 0.0  # nll_ce after a step against it in the word embeddings (Miyato et al. 2017; RocketQA's CE)
  margin_mse: float = 0.0  # of the margins positive - negative, dual-encoder's and cross-encoder's (Hofstätter 2020)
  kl_listwise: float = 0.0  # kl_ce_de whose gradient reaches the cross-encoder too (RocketQAv2)
  kl_bidirectional: float = 0.0  # KL(p_ce || p_de) + KL(p_de || p_ce), gradient on both sides (LEAD)
  virt: float = 0.0  # squared error of attention maps, layer by layer (VIRT)

  def __post_init__(self):
    for term, weight in dataclasses.asdict(self).items():
      check(0 <= weight < math.inf, f"weights.{term}", weight, "must be a number >= 0")
    check(bool(self.active), "weights", "all 0", "give at least one term a weight above 0")

  @classmethod
  def only(cls, **weights: float) -> Weights:
    """The named weights; every other term is off."""
    off = {field.name: 0.0 for field in dataclasses.fields(cls)}
    return cls(**(off | weights))

  @property
  def active(self) -> frozenset[str]:
    return frozenset(term for term, weight in dataclasses.asdict(self).items() if weight > 0)

  @property
  def trains_teacher(self) -> bool:
    """Whether some term sends a gradient to the cross-encoder."""
    return bool(self.active & TEACHING)

  @property
  def needs_teacher(self) -> bool:
    return bool(self.active & (TEACHING | TAUGHT))

  @property
  def needs_dual(self) -> bool:
    return bool(self.active & VECTORS) or self.needs_twin

  @property
  def needs_late(self) -> bool:
    return bool(self.active & {"nll_li", "kl_ce_li", "kl_li_de", "kl_attention"})

  @property
  def needs_student(self) -> bool:
    return self.needs_dual or self.needs_late or self.virt > 0

  @property
  def needs_twin(self) -> bool:
    return bool(self.active & {"dualreg_query", "dualreg_passage"})


@dataclasses.dataclass(frozen=True)
class Temperatures:
  """Scores are divided by these before every softmax (choice: 1 everywhere, as the paper's family does)."""

  dual: float = 1.0
  late: float = 1.0
  cross: float = 1.0
  attention: float = 1.0

  def __post_init__(self):
    for field, value in dataclasses.asdict(self).items():
      check(value > 0, f"temperature.{field}", value, "must be above 0")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW, linear warm-up, linear decay to 0; no weight decay on norms and biases."""

  learning_rate: float = 2e-5
  head_learning_rate: float | None = None  # of the students' projections and the logit; None: the same
  teacher_learning_rate: float | None = None  # of the cross-encoder's own parameters; None: the same
  warmup: float = 0.1  # share of the stage's steps
  weight_decay: float = 0.01
  clip: float = 1.0  # largest global gradient norm

  def __post_init__(self):
    check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be above 0")
    check(0 <= self.warmup <= 1, "optimizer.warmup", self.warmup, "is a share of the steps, in [0, 1]")
    for field in ("head_learning_rate", "teacher_learning_rate"):
      rate = getattr(self, field)
      check(rate is None or 0 < rate < math.inf, f"optimizer.{field}", rate, "must be above 0")
    check(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "must be a number >= 0")
    check(self.clip > 0, "optimizer.clip", self.clip, "must be above 0; use a large number to switch it off")


Stage = Literal["post", "interaction", "warmup", "cascade"]  # those that train
OWN_LIST = (TEACHING | TAUGHT) - {"kl_attention", "virt"}  # compare passages; these two, tokens


@dataclasses.dataclass(frozen=True)
class Train:
  """One training stage: how long, on what, towards which loss."""

  steps: int = 1000  # 0: the stage is left out
  batch: int = 64  # B: queries in the global batch, over all devices
  negatives: int = 0  # n: hard negatives of each query; its list has K = 1 + n passages
  hardest: int | None = None  # they are drawn from so many, the best ranks; None: all; 0: none, only random passages
  chunk: int | None = None  # queries encoded at once on each device, with their lists; None: all. Memory for a forward
  recompute: bool = True  # of a chunk, in the backward pass; False: the activations of all chunks are held
  weights: Weights = Weights()
  final_weights: Weights | None = None  # reached in the last step, linearly from `weights`; None: constant
  temperature: Temperatures = Temperatures()
  final_temperature: Temperatures | None = None  # as `final_weights`
  fgm_radius: float = 0.01  # nll_ce_fgm: how far all word embeddings together are moved
  mlm_length: int = 128  # mlm: tokens of a row of masked text, which the corpus fills end to end; `batch` rows a step
  mlm_rate: float = 0.15  # mlm: share of a row's tokens that are predicted, whole words
  mlm_texts: tuple[str, ...] = ()  # mlm: files of further text, a passage a line, beside the data set's corpus
  # Pseudo-queries of post-training. title: a passage's title finds its text (where there is none, as cloze); cloze: a
  # sentence finds the passage that it was taken out of.
  pseudo: Literal["title", "cloze"] = "title"
  dual_pool: Literal["global", "own"] = "global"  # candidates of nll_de: every passage of the global batch, or its list
  late_pool: Literal["global", "own"] = "own"  # candidates of nll_li and kl_li_de
  in_batch: int | None = None  # queries whose passages are each other's negatives; None: all (cross-batch)
  # joint: trained by its own terms; frozen: as it comes; uniform: all candidates alike, the control of distillation
  teacher: Literal["joint", "frozen", "uniform"] = "joint"
  # The teacher's score is its own logit plus its student's late interaction, which it so learns to correct; no gradient
  # reaches late interaction that way. For a cross-encoder that alone ranks little better than late interaction.
  residual: bool = False
  optimizer: Optimizer = Optimizer()
  checkpoint_every: int = 50  # steps
  keep: int = 2  # newest checkpoints kept; the best measured one is kept besides
  measure_every: int = 0  # steps between measurements on dev; then the best measured student is the stage's result

  def __post_init__(self):
    check_choices(self, "")
    for field in ("batch", "checkpoint_every", "keep"):
      check(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
    for field in ("steps", "negatives", "fgm_radius"):
      check(0 <= getattr(self, field) < math.inf, field, getattr(self, field), "must be 0 or more")
    check(self.hardest is None or self.hardest >= 0, "hardest", self.hardest, "must be 0 or more, or None for all")
    check(self.chunk is None or self.chunk >= 1, "chunk", self.chunk, "must be at least 1, or None for no chunks")
    check(self.measure_every >= 0, "measure_every", self.measure_every, "must be 0 (never) or more")
    check(self.mlm_length >= 8, "mlm_length", self.mlm_length, "needs at least 8 tokens")
    check(0 < self.mlm_rate < 1, "mlm_rate", self.mlm_rate, "is a share of the tokens, in (0, 1)")
    group, on = self.in_batch, self.on
    check(
      group is None or (group >= 1 and self.batch % group == 0),
      "in_batch",
      group,
      f"must divide batch={self.batch}, or be None",
    )
    check(group != 1 or self.negatives > 0, "in_batch", group, "leaves no negative at all: use 2 or more, or negatives")
    check(bool(on.mlm) or not self.mlm_texts, "mlm_texts", self.mlm_texts, "are read by weights.mlm, which is 0")
    check(
      not self.measure_every or on.needs_student or on.mlm > 0,
      "measure_every",
      self.measure_every,
      "measures the student, which no term of this stage trains: set it to 0",
    )
    check(
      not (self.residual and self.needs_cross) or on.needs_late,
      "residual",
      True,
      "adds late interaction's scores, which no term of this stage needs: set it to False",
    )
    lists = on.active & OWN_LIST
    check(
      self.negatives > 0 or not lists,
      "negatives",
      self.negatives,
      f"{', '.join(sorted(lists))} compare a query's own passages: give it hard negatives, or weight 0",
    )
    check(
      self.negatives > 0 or self.late_pool == "global" or not on.active & {"nll_li", "kl_li_de"},
      "late_pool",
      self.late_pool,
      "without hard negatives a query's own list is one passage: use late_pool='global'",
    )
    check(
      self.negatives > 0 or self.dual_pool == "global" or not on.nll_de,
      "dual_pool",
      self.dual_pool,
      "without hard negatives a query's own list is one passage: use dual_pool='global'",
    )
    for term in sorted(on.active):
      check(
        self.teacher == "joint" or term not in TEACHING,
        f"weights.{term}",
        getattr(on, term),
        f"trains nothing when the teacher is {self.teacher}: set it to 0, or teacher='joint'",
      )
    check(
      self.teacher != "uniform" or not on.active & {"margin_mse", "virt"},
      "teacher",
      self.teacher,
      "has neither scores nor layers for margin_mse and virt: set their weights to 0",
    )

  @property
  def on(self) -> Weights:
    """Every term that has a weight in some step: its largest."""
    if self.final_weights is None:
      return self.weights
    last = dataclasses.asdict(self.final_weights)
    return Weights(**{name: max(x, last[name]) for name, x in dataclasses.asdict(self.weights).items()})

  @property
  def needs_cross(self) -> bool:
    """Whether the cross-encoder runs."""
    return self.on.needs_teacher and self.teacher != "uniform"

  @property
  def teaches_first(self) -> bool:
    """Whether the cross-encoder's gradient is that of nll_ce, of its own logits alone."""
    return self.on.active & TEACHING == {"nll_ce"} and not self.residual

  @property
  def needs_pairs(self) -> bool:
    """Whether some term compares a query with passages."""
    return self.on.needs_student or self.on.needs_teacher

  @property
  def predicted(self) -> int:
    """m: tokens of a row of masked text that are predicted, at most."""
    return max(1, round(self.mlm_rate * (self.mlm_length - 2)))  # of a row that one text fills: all but [CLS] and [SEP]


@dataclasses.dataclass(frozen=True)
class Mine:
  """Hard negatives: the current student's ranks first..last, known positives and equal texts left out.

  With `denoise` or `margin`, the warmed-up cross-encoder takes out mined ones before the cascade.
  """

  first: int = 1
  last: int = 30
  sample: int | None = None  # so many of these ranks, drawn from the seed; None: all
  # Only those with at most this cross-encoder probability (RocketQA: 0.1, of one trained on single pairs; ours learns
  # from lists, where only differences of logits count: there use `margin`).
  denoise: float | None = None
  margin: float | None = None  # only those whose logit is this far below the known positive's
  use: Literal["mined", "given", "both"] = "mined"  # given: the data set's own
  refresh: int = 0  # steps of the cascade after which its student mines again; 0: never

  def __post_init__(self):
    check_choices(self, "mine.")
    check(1 <= self.first <= self.last, "mine.first", self.first, f"must lie in 1..mine.last={self.last}")
    check(self.sample is None or self.sample >= 1, "mine.sample", self.sample, "must be at least 1, or None for all")
    check(self.denoise is None or 0 < self.denoise < 1, "mine.denoise", self.denoise, "is a probability, in (0, 1)")
    check(self.margin is None or not math.isnan(self.margin), "mine.margin", self.margin, "must be a number, or None")
    check(self.refresh >= 0, "mine.refresh", self.refresh, "must be 0 (never) or more")
    for field, value in {"denoise": self.denoise, "margin": self.margin, "refresh": self.refresh or None}.items():
      remedy = "is about mined negatives, of which mine.use='given' takes none: leave it out"
      check(self.use != "given" or value is None, f"mine.{field}", value, remedy)

  @property
  def judged(self) -> bool:
    """Whether the cross-encoder reads what is mined."""
    return self.denoise is not None or self.margin is not None

  @property
  def wanted(self) -> int:
    """Hard negatives of a query."""
    ranks = self.last - self.first + 1
    return ranks if self.sample is None else min(self.sample, ranks)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """How deep late interaction and the cross-encoder re-rank the dual-encoder's list on the test split."""

  late_depth: int = 100
  cross_depth: int = 100
  teacher_depth: int = 20  # of the check on dev that the teacher out-ranks the student before the cascade
  teacher_queries: int = 200  # dev queries of that check
  dev_queries: int = 200  # dev queries measured during training, where `measure_every` asks for it,
  dev_passages: int = 2000  # over their positives and so many other passages
  metric: Literal["MRR@10", "R@20", "nDCG@10", "R@100"] = "MRR@10"  # of the dual-encoder: which measured step is best

  def __post_init__(self):
    check_choices(self, "evaluate.")
    for field in ("late_depth", "cross_depth", "teacher_depth", "teacher_queries", "dev_queries", "dev_passages"):
      check(getattr(self, field) >= 1, f"evaluate.{field}", getattr(self, field), "must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
  """The training strategy. `ernie-jax run` takes its stages in this order."""

  seed: int = 0
  data: Data = Data()
  model: Model = Model()
  # Post-training: masked language modelling; with weights for interaction distillation, on pseudo-queries in the same
  # step. Its last step is kept.
  post: Train = Train(steps=0, weights=Weights.only(mlm=1), late_pool="global")
  interaction: Train = Train(
    weights=Weights.only(nll_de=1, nll_li=1, kl_li_de=1, dualreg_query=1, dualreg_passage=1),
    late_pool="global",
  )
  mine: Mine = Mine()
  warmup: Train = Train(batch=8, negatives=3, weights=Weights.only(nll_ce=1))
  cascade: Train = Train(batch=8, negatives=3)
  evaluate: Evaluate = Evaluate()

  def __post_init__(self):
    check(0 <= self.seed < 2**31, "seed", self.seed, "must lie in 0..2147483647")
    check(
      self.model.tied or not (self.post.steps and self.post.on.mlm),
      "post.weights.mlm",
      self.post.on.mlm,
      "trains the passages' encoder only: set model.tied=True; or in a run of its own, from which model.start begins",
    )
    for name in get_args(Stage):
      check(
        name == "post" or not getattr(self, name).on.mlm,
        f"{name}.weights.mlm",
        getattr(self, name).on.mlm,
        "masked language modelling is for post-training: use post.weights.mlm and post.steps",
      )
      check(
        not (self.model.share_encoder and getattr(self, name).teacher == "frozen"),
        f"{name}.teacher",
        "frozen",
        "a teacher that shares the student's encoder cannot stay as it is: set model.share_encoder=False",
      )


@dataclasses.dataclass(frozen=True)
class Hosts:
  """How the processes of one run on several hosts find each other; by default they do not, and each is a run."""

  multihost: bool = False  # this process is one of several; what follows comes from the launcher where it knows
  coordinator: str | None = None  # HOST:PORT of process 0; else JAX_COORDINATOR_ADDRESS
  processes: int | None = None  # how many there are; else JAX_NUM_PROCESSES
  process: int | None = None  # which of them this is, from 0; else JAX_PROCESS_ID
