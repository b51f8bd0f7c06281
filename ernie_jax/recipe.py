"""The training strategy from end to end, as stages (METHOD: training strategy).

  prepare -> baselines -> post -> interaction -> mine -> warmup -> check -> denoise -> cascade -> encode -> evaluate

Each stage owns a folder of the run and ends by writing `manifest.json` there; a stage that has one is done, and its
result is read back. So the same command, given again, continues where it was stopped. A training stage of 0 steps is
left out, and so is what serves it alone; `denoise` is a stage only where `mine.denoise` or `mine.margin` asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ernie_jax import (
  attention,
  batches,
  checkpoints,
  collection,
  config,
  datasets,
  encoder,
  evaluate,
  hub,
  losses,
  masking,
  mesh,
  mining,
  pretrained,
  pseudo,
  report,
  retrieval,
  scores,
  step,
  templates,
  tokens,
  topk,
)
from ernie_jax.bm25 import BM25
from ernie_jax.columns import Ragged
from ernie_jax.config import Config, Interrupted, UserError, Weights, flat
from ernie_jax.datasets import files
from ernie_jax.progress import clock, say
from ernie_jax.scores import Batch, Params, Student, Teacher, late_width
from ernie_jax.train import Trained, finished, train

STAGES = (
  "prepare",
  "baselines",
  "post",
  "interaction",
  "mine",
  "warmup",
  "check",
  "denoise",
  "cascade",
  "encode",
  "evaluate",
)
TRAINED = {"post": 3, "interaction": 0, "warmup": 1, "cascade": 2}  # and a number, for the seed of each
DEPTH = 100  # of the dual-encoder's run files
NEGATIVES = "negatives.trec"


@dataclasses.dataclass
class Run:
  """What the stages share. Row numbers count passages, and queries of each split, as the data set does.

  Parameters rest in the host's memory between their uses: a stage that trains needs the devices'.
  """

  directory: Path
  config: Config
  data: datasets.Dataset
  tokenizer: tokens.Tokenizer
  passages: Ragged
  queries: dict[str, Ragged]  # by split
  identity: np.ndarray
  params: Params = dataclasses.field(default_factory=dict)  # to start from
  masked: Params = dataclasses.field(default_factory=dict)  # the head of masked language modelling, where it is used
  further: tuple[Ragged, ...] = ()  # texts besides the corpus: post.mlm_texts

  @property
  def template(self) -> templates.Template:
    return templates.Template(self.tokenizer, self.config.data)

  def stage(self, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Does the work of a stage in its folder unless it is done; its result, with the seconds it took."""
    return once(self.directory / name, work)

  def encode(self, params: Params, store: Ragged, what: str, *, late: bool) -> retrieval.Encoded:
    """Passages, or queries (`what` says which), with the given student."""
    query = what != "passages"
    student, model = params["student"], self.config.model
    return retrieval.encode(student, model, store, self.template, query=query, late=late, progress=f"encode {what}")

  def as_run(self, split: str, values: Iterable[np.ndarray], found: Iterable[np.ndarray]) -> evaluate.Run:
    """Scores and passage rows [Q, k] with their ids; row -1 is no passage."""
    ids = self.data.corpus.ids
    return {
      query: {ids[row]: float(score) for row, score in zip(rows, scores) if row >= 0}
      for query, rows, scores in zip(self.data.queries[split].ids, found, values)
    }

  def measure(self, name: str, split: str, values: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Writes the ranking to `runs/` and measures it over all queries of the split."""
    run = self.as_run(split, values, found)
    self.write_run(run, folder(self.directory / "runs") / f"{split}.{name}.trec", name)
    return evaluate.metrics(run, self.data.qrels(split))

  def write_run(self, run: evaluate.Run, path: Path, name: str) -> None:
    lead(str(path), lambda: evaluate.write_run(run, path, name))


def run(settings: Config, directory: Path, fresh: bool = False) -> dict[str, Any]:
  """Runs, or continues, the whole strategy in `directory`; returns what `metrics.json` holds."""
  start = time.monotonic()
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(f"this is one of {jax.process_count()} hosts, each would be a run: add --multihost")
  divides(settings)
  mesh.agree("the command", json.dumps([str(directory), fresh, dataclasses.asdict(settings)]))
  lead("claim", lambda: claim(directory, settings, fresh, goes_on=True))
  shared(directory)
  with jax.set_mesh(mesh.make()):
    current = prepare(directory, settings)
    current.stage("baselines", lambda _: baselines(current))
    begun = before_cascade(current)
    students = {"interaction": begun.student}  # what comes before the cascade, though its stage be left out
    best = "interaction"
    if settings.cascade.steps:
      students["cascade"] = fit(current, "cascade", begun.params, begun.negatives)
      encoding = current.stage("encode", lambda place: encode(current, students["cascade"], place))
      best = "interaction" if begun.mined["dev"]["MRR@10"] > encoding["dev"]["MRR@10"] else "cascade"
    teacher = students.get("cascade", begun.params)
    look(current, {"before": begun.params, "after": teacher}, directory / "evaluate" / "attention.json")
    results = current.stage("evaluate", lambda _: measure(current, students, best, teacher))
  stages = {name: read(path) for name in STAGES if (path := directory / name / "manifest.json").is_file()}
  results = {k: v for k, v in results.items() if k != "seconds"}
  manifest = {
    "config": dataclasses.asdict(settings),
    "seed": settings.seed,
    "data": stages["prepare"]["data"],
    "start": stages["prepare"]["start"],
    "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    "stages": stages,
    "best_stage": best,
    "teacher_check": begun.check,
  }

  def conclude() -> None:
    config.write(directory / "manifest.json", json.dumps(manifest, indent=2))
    config.write(directory / "metrics.json", json.dumps(results, indent=2))
    page = report.write_report(directory)
    say(f"done in {clock(time.monotonic() - start)}: {page}")

  lead("conclude", conclude)
  return results


def divides(settings: Config) -> None:
  """`UserError` unless every stage's batch divides over the devices: now, not after hours."""
  for name, stage in trained(settings).items():
    try:
      step.divides(stage, jax.device_count())
    except UserError as error:
      raise UserError(f"{name}.{error}") from error


def trained(settings: Config) -> dict[str, config.Train]:
  """The training stages that are not left out."""
  return {name: stage for name in TRAINED if (stage := getattr(settings, name)).steps}


def lead(what: str, work: Callable[[], Any]) -> None:
  """Process 0 writes to the run's folder; the others wait until it has."""
  if mesh.leads():
    work()
  mesh.wait(what)


def shared(directory: Path) -> None:
  """`UserError` in every process unless all see the same output folder."""
  if jax.process_count() == 1:
    return
  sign = directory / "claimed.txt"
  lead("sign", lambda: config.write(sign, f"{time.time_ns()} {os.getpid()}"))
  try:
    content = sign.read_text()
  except OSError:
    content = ""
  try:
    mesh.agree("--output", content)
  except UserError:
    raise UserError(
      f"--output {directory}: not every process sees what process 0 writes there; name a folder on storage that all "
      "hosts share"
    ) from None


def claim(
  directory: Path, settings: Config, fresh: bool, what: str = "run", file: str = "config.json", goes_on: bool = False
) -> None:
  """Makes the folder a run (or `what`) of this configuration, or checks that it is one.

  With `goes_on` what bounds memory may be another than it was, and is in the file from now on: it changes results by
  rounding alone.
  """
  path = directory / file
  wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
  if directory.exists() and not directory.is_dir():
    raise UserError(f"--output {directory}: is a file; name a folder")
  found = read(path) if path.is_file() else None
  # Other tools leave a config.json too: only a run's own is ever deleted or continued.
  ours = isinstance(found, dict) and {"seed", "interaction", "warmup", "cascade"} <= set(found)
  if not ours and directory.is_dir() and any(directory.iterdir()):
    raise UserError(f"--output {directory}: holds files but no {what}; name an empty or a new folder")
  if fresh and ours:
    shutil.rmtree(directory)
  if fresh or not ours:
    config.write(folder(directory) / file, json.dumps(wanted, indent=2))
  elif found is not None and found != wanted:
    new = flat(wanted)
    # Fields that are younger than the run have their defaults.
    usual = flat(json.loads(json.dumps(dataclasses.asdict(Config()))))
    # One that is gone said where AdamW's moments are held, which changes no result.
    kept = {name: value for name, value in flat(found).items() if not name.endswith(".optimizer.shard")}
    old = {name: usual[name] for name in new.keys() & usual.keys()} | kept
    differing = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    bounds = ("model.scan", "model.remat", ".recompute") + (() if settings.data.pack else (".chunk",))
    field = next((name for name in differing if not (goes_on and name.endswith(bounds))), None)
    if field is None:
      if differing:
        config.write(path, json.dumps(wanted, indent=2))
      return
    raise UserError(
      f"--output {directory}: holds a run with {field}={old.get(field)!r}, not {new.get(field)!r}; "
      "name another folder, or add --fresh to start anew"
    )


def folder(path: Path) -> Path:
  """The folder, made if need be."""
  path.mkdir(parents=True, exist_ok=True)
  return path


def read(path: Path) -> dict[str, Any]:
  """A JSON file of the run."""
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path}: damaged ({error}); delete its folder, and the run makes it again") from error


def once(directory: Path, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
  """The stage's manifest: from an earlier run, or made by doing the work."""
  done = directory / "manifest.json"
  if mesh.told(mesh.leads() and done.is_file()):
    say(f"{directory.name}: done before")
    return read(done)
  if mesh.asked_to_stop():
    raise Interrupted(f"before {directory.name}", signal.SIGTERM)
  say(f"{directory.name}")
  start = time.monotonic()
  result = work(folder(directory))
  seconds = time.monotonic() - start
  lead(str(done), lambda: config.write(done, json.dumps({**result, "seconds": round(seconds, 1)}, indent=2)))
  say(f"  {directory.name} took {clock(seconds)}")
  return read(done)


# ---- Stages --------------------------------------------------------------------------------------------------------


def prepare(directory: Path, settings: Config) -> Run:
  """Data set, tokenizer, token stores, and the parameters to start from."""
  with mesh.first("prepare"):
    current, checkpoint_pair, shapes = sources(directory, settings)
  mesh.agree("the data, weights or tokenizer", json.dumps(read(directory / "prepare" / "manifest.json")["begun"]))
  key = jax.random.key(settings.seed)
  params = step.init_params(settings.model, *shapes, key)
  if settings.post.steps and settings.post.on.mlm:
    params["masked"] = scores.Masked(shapes[0], jax.random.fold_in(key, 0x3A5))
  params, random = pretrained.assign(params, *checkpoint_pair)
  if random and checkpoint_pair[0] is not None:
    say(f"  random at the start, for no checkpoint brings it: {', '.join(random)}")
  params = jax.device_get(params)
  current.masked = {"masked": params.pop("masked")} if "masked" in params else {}
  current.params = params
  return current


def sources(directory: Path, settings: Config) -> tuple[Run, tuple[Any, Any], tuple[Any, Any]]:
  """What a run reads, without its parameters; then both checkpoints, and the shapes of both encoders."""
  cache = Path(settings.data.cache).expanduser()
  place = folder(directory / "prepare")
  begin = time.monotonic()
  say("prepare")
  data = datasets.load(settings.data)
  for split in ("train", "dev", "test"):
    if not len(data.queries[split].ids):
      raise UserError(f"data.name={settings.data.name!r}: no {split} queries; add packages or use a larger data set")
  own_teacher = bool(settings.model.teacher_start)
  student = start("model.start", settings.model.start, cache)
  teacher = student
  if own_teacher:
    teacher = start("model.teacher_start", settings.model.teacher_start, cache, teacher=True)
  elif student and student.pair:
    teacher = start("model.start", settings.model.start, cache, teacher=True)
  said = [f"{c.source}: {note}" for c in (student, teacher) if c for note in c.notes]
  said += [f"{student.source}: {note}" for note in student.against(settings.model, settings.data)] if student else []
  for line in dict.fromkeys(said):
    say(f"  {line}")
  student = student and student.with_layers(settings.model.start_layers, "model.start_layers")
  passages = data.corpus.passages
  if student is not None:
    tokenizer = tokens.Tokenizer.load(student.directory)
  else:
    tokenizer = tokens.Tokenizer.train(passages, settings.model.scratch.vocabulary)
  if own_teacher and teacher is not None:
    teacher.must_read(tokenizer, f"model.teacher_start={settings.model.teacher_start!r}")
  # What this run began with; a run continues with nothing else.
  known = place / "manifest.json"
  begun = {
    "data": data.fingerprint,
    "start": "random weights" if student is None else student.source,
    "weights": ["random" if c is None else c.digest() for c in (student, teacher)],
    "tokenizer": tokens.digest(tokenizer),
  }
  further = [Path(name).expanduser() for name in settings.post.mlm_texts if settings.post.steps]
  if further:
    begun["post.mlm_texts"] = files.signature(further)
  if known.is_file() and (before := read(known).get("begun", {})) != begun:
    field = next(name for name in begun if before.get(name) != begun[name])
    raise UserError(
      f"{directory}: {field} changed since this run began ({before.get(field)} -> {begun[field]}); use --fresh"
    )
  if mesh.leads():
    tokenizer.save(place / "tokenizer")
  scratch = settings.model.scratch
  shapes = (
    architecture(settings, student, tokenizer, scratch),
    architecture(settings, teacher, tokenizer, settings.model.teacher_scratch or scratch),
  )
  config.check(
    not (settings.post.steps and settings.post.on.mlm) or settings.post.mlm_length <= shapes[0].positions,
    "post.mlm_length",
    settings.post.mlm_length,
    f"the encoder has {shapes[0].positions} positions; shorten it",
  )
  same = [dataclasses.replace(a, dropout=0, attention_dropout=0) for a in shapes]
  if settings.model.teacher_from_student and same[0] != same[1]:
    raise UserError(
      f"model.teacher_from_student=True: the student has {shapes[0].layers} layers of width {shapes[0].width}, the "
      f"cross-encoder {shapes[1].layers} of {shapes[1].width}; set it to False"
    )
  suits(settings, data, shapes[0])
  store = lambda split: tokens.store(data, split, tokenizer, settings.data)
  current = Run(
    directory,
    settings,
    data,
    tokenizer,
    store("corpus"),
    {split: store(split) for split in data.queries},
    data.corpus.identity,
    further=(tokens.store_lines(further, tokenizer, settings.data),) if further else (),
  )
  if not known.is_file():
    collection.write_texts(place, data.corpus.ids, data.corpus.titles, data.corpus.texts, data.fingerprint)
    for split in data.queries:
      evaluate.write_qrels(data.qrels(split), place / f"qrels.{split}.trec")
    test = data.queries["test"]
    evaluate.write_queries(zip(test.ids, test.texts), place / "queries.test.tsv")
    sizes = {split: len(q.ids) for split, q in data.queries.items()}
    result = {
      "data": {"fingerprint": data.fingerprint, "passages": len(passages), "queries": sizes},
      "start": begun["start"],
      "begun": begun,
      "seconds": round(time.monotonic() - begin, 1),
    }
    config.write(known, json.dumps(result, indent=2))
    say(f"  prepare took {clock(time.monotonic() - begin)}")
  say(f"  {len(passages)} passages, {len(data.queries['train'].ids)} training queries, from {read(known)['start']}")
  return current, (student, teacher), shapes


def suits(settings: Config, data: datasets.Dataset, student: config.Architecture) -> None:
  """`UserError` if a stage asks for dropout that the student lacks, or for more negatives than there are passages."""
  if settings.mine.use != "mined" and not data.queries["train"].negatives.lengths.any():
    raise UserError(
      f"mine.use={settings.mine.use!r}: the training queries bring no negatives; use 'mined', or add some to the data"
    )
  rate = encoder.with_dropout(student, settings.model.dropout)
  for name, stage in trained(settings).items():
    if max(rate.dropout, rate.attention_dropout) == 0 and stage.on.needs_twin:
      raise UserError(f"{name}.weights.dualreg_query: without dropout DualReg is 0; set its weights to 0")
  needed = max((stage.negatives for stage in trained(settings).values()), default=0)
  most = max(int(q.positives.lengths.max()) for q in data.queries.values())
  copies = int(np.bincount(data.corpus.identity).max())
  if len(data.corpus.passages) < needed + most * copies:
    raise UserError(
      f"negatives={needed}: the corpus of {len(data.corpus.passages)} passages is too small for so many beside the "
      "positives"
    )


def start(field: str, name: str, cache: Path, *, teacher: bool = False) -> pretrained.Checkpoint | None:
  """The checkpoint that a field names; None for a start from scratch."""
  if not name:
    return None
  try:
    return pretrained.load(*hub.locate(name, cache, field), teacher=teacher)
  except hub.Unreachable as error:
    say(f"  {error}: starting from random weights, with a vocabulary built from the corpus; expect far lower quality")
    return None


def architecture(
  settings: Config, checkpoint: pretrained.Checkpoint | None, tokenizer: tokens.Tokenizer, scratch: config.Architecture
) -> config.Architecture:
  """Shape of an encoder (`scratch` if no checkpoint) with the tokenizer's vocabulary and special tokens, checked."""
  if checkpoint is None:
    a = dataclasses.replace(scratch, vocabulary=len(tokenizer), special=tokenizer.special)
  else:
    a = checkpoint.read_with(tokenizer)
  settings.data.fits(a)
  return a


def baselines(current: Run) -> dict[str, Any]:
  """BM25 and the model before training, on the test split."""
  test = current.data.queries["test"]
  by_words = BM25.build(current.data.corpus.passages).search(test.texts, DEPTH)
  passages = current.encode(current.params, current.passages, "passages", late=False)
  queries = current.encode(current.params, current.queries["test"], "test queries", late=False)
  order = collection.open_passages(current.directory / "prepare", current.data.fingerprint).order
  found = topk.top_k(queries.vectors, passages.vectors, DEPTH, order=order)
  return {
    "bm25": current.measure("bm25", "test", *by_words),
    "zero_shot": current.measure("zero_shot", "test", *found),
  }


@dataclasses.dataclass(frozen=True)
class Begun:
  """What the cascade begins with."""

  student: Params  # after interaction distillation
  params: Params  # after the cross-encoder's warm-up
  negatives: Ragged  # passage rows of each training query
  mined: dict[str, Any]  # the result of `mine`
  check: dict[str, Any] | None  # of the teacher; None where none teaches


def before_cascade(current: Run) -> Begun:
  """Every stage between `baselines` and the cascade."""
  settings, directory = current.config, current.directory
  begun = post_train(current) if settings.post.steps else current.params
  interaction = fit(current, "interaction", begun, None)
  mined = current.stage("mine", lambda place: mine(current, interaction, place))
  negatives = hard(current, directory / "mine" / NEGATIVES)
  start = with_student_s_encoder(interaction) if settings.model.teacher_from_student else interaction
  warm = fit(current, "warmup", start, negatives)
  check = None
  if settings.cascade.steps and settings.cascade.needs_cross:
    check = current.stage("check", lambda _: check_teacher(current, interaction, warm))
  if settings.mine.judged and settings.cascade.steps:
    current.stage("denoise", lambda place: denoise(current, warm, place))
    negatives = hard(current, directory / "denoise" / NEGATIVES)
  return Begun(interaction, warm, negatives, mined, check)


def trained_once(
  current: Run, name: str, params: Params, work: Callable[[Path], tuple[Trained, dict[str, Any]]]
) -> Params:
  """What a stage trains from the given parameters, or its result read back; `work` gives more for its manifest, too."""
  stage: config.Train = getattr(current.config, name)
  place = current.directory / name
  if mesh.told(mesh.leads() and (place / "manifest.json").is_file()):
    say(f"{name}: done before")
    return finished(place, params, current.config.model, stage, read(place / "manifest.json")["kept"])
  trained: list[Params] = []  # handed out of the stage

  def whole(place: Path) -> dict[str, Any]:
    found, more = work(place)
    trained.append(found.params)
    return {
      "steps": stage.steps,
      "batch": stage.batch,
      "negatives": stage.negatives,
      "kept": found.step,
      "best": found.best,
      "skipped": found.skipped,
      **more,
      "compilations": found.compilations,
    }

  current.stage(name, whole)
  return trained[0]


def seed_of(current: Run, name: str) -> int:
  """The seed of a stage's data and noise."""
  return 1000 * TRAINED[name] + current.config.seed


def post_train(current: Run) -> Params:
  """Post-trains the student on the corpus (and `post.mlm_texts`): masked language modelling, pseudo-queries, or both.

  The manifest says what masked language modelling's loss on held-out text was before and after.
  """
  settings, stage = current.config, current.config.post
  params = current.params | current.masked

  def work(place: Path) -> tuple[Trained, dict[str, Any]]:
    texts, held_out = post_texts(current, place)
    loss = None if held_out is None else held_out_loss(current, held_out)
    begun = loss(params) if loss else 0.0
    found = train(
      *(place, params, texts, settings.model, settings.data, stage, seed_of(current, "post")),
      post_measure(current, loss) if stage.measure_every else None,
    )
    if loss is None or held_out is None:
      return found, {}
    ended = loss(found.params)
    say(f"  loss of masked words in {len(held_out)} texts held out: {begun:.3f} before, {ended:.3f} after")
    return found, {"heldout_mlm": {"before": begun, "after": ended, "texts": len(held_out)}}

  found = trained_once(current, "post", params, work)
  return {name: found[name] for name in current.params}


def post_measure(current: Run, loss: Callable[[Params], float] | None) -> Callable[[Params], dict[str, float]]:
  """Measures post-training on its way: masked language modelling's `loss` on held-out text, and retrieval on dev."""
  dev = dev_slice(current)
  return lambda params: ({"heldout_mlm": loss(params)} if loss else {}) | dev(params)


def post_texts(current: Run, place: Path) -> tuple[batches.Texts, masking.Plain | None]:
  """What post-training reads; and the texts that are held out of masked language modelling, if it is on."""
  stage, tokenizer = current.config.post, current.tokenizer
  plain, held_out = None, None
  if stage.on.mlm:
    plain, held_out = masking.held_out((current.passages, *current.further), stage.mlm_length)
  if not stage.needs_pairs:
    return batches.Texts.unpaired(plain, tokenizer), held_out
  data, seed = current.config.data, seed_of(current, "post")
  with mesh.first("pseudo-queries"):
    titles = tokens.store(current.data, "titles", tokenizer, data)
    pairs = pseudo.pairs(
      place / "pairs", current.passages, titles, current.identity, tokenizer, data, stage.pseudo, seed
    )
  queries, passages, identity = pairs
  different = len(np.unique(identity))
  if different < stage.negatives + 2:
    raise UserError(
      f"post.weights: only {different} pseudo-queries differ in query and text, too few for negatives; "
      "use --post.pseudo cloze, or masked language modelling alone"
    )
  one = Ragged(np.arange(len(queries), dtype=np.int32), np.arange(len(queries) + 1))
  none = Ragged(np.zeros(0, np.int32), np.zeros(len(queries) + 1, np.int64))
  return batches.Texts(queries, passages, identity, one, none, tokenizer, plain), held_out


def held_out_loss(current: Run, held_out: masking.Plain) -> Callable[[Params], float]:
  """Measures -log p of the masked tokens of held-out texts: the mean over all; no dropout, always the same masks."""
  settings, stage, grid = current.config, current.config.post, mesh.make()
  batch = jax.device_count() * min(stage.batch // jax.device_count(), 8)
  alone = dataclasses.replace(
    stage, batch=batch, chunk=None, in_batch=None, weights=Weights.only(mlm=1), final_weights=None, measure_every=0
  )
  rows = masking.every_row(held_out, stage, current.tokenizer, batch)
  own = mesh.share(grid, batch)

  @jax.jit
  def sums(params, batch):
    found = scores.score(params, batch, settings.model, alone, None)
    return found.masked.sum(), found.masked_there.sum()

  def measure(params: Params) -> float:
    params, total, count = mesh.whole(params, grid), 0.0, 0
    for begin in range(0, len(rows.tokens), batch):
      some = Batch(masked=jax.tree.map(lambda x: x[begin + own], rows))
      found = sums(params, mesh.shard(some, grid))
      total, count = total + float(found[0]), count + int(found[1])
    return total / max(count, 1)

  return measure


def texts_of(current: Run, split: str, negatives: Ragged) -> batches.Texts:
  """What batches of a split's queries are gathered from."""
  positives = current.data.queries[split].positives
  return batches.Texts(
    current.queries[split], current.passages, current.identity, positives, negatives, current.tokenizer
  )


def fit(current: Run, name: str, params: Params, negatives: Ragged | None) -> Params:
  """Trains a stage from the given parameters, or reads its result back; a stage of 0 steps hands them on."""
  stage: config.Train = getattr(current.config, name)
  if not stage.steps:
    return params

  def work(place: Path) -> tuple[Trained, dict[str, Any]]:
    none = Ragged(np.zeros(0, np.int32), np.zeros(len(current.queries["train"]) + 1, np.int64))
    texts = texts_of(current, "train", none if negatives is None else negatives)
    seed = seed_of(current, name)
    settings = current.config
    measuring = dev_slice(current) if stage.measure_every else None
    metric = settings.evaluate.metric
    every = settings.mine.refresh if name == "cascade" else 0
    again = functools.partial(refresh, current, place, texts) if every else None
    found = train(
      place, params, texts, settings.model, settings.data, stage, seed, measuring, metric, refresh=again, every=every
    )
    return found, {"refreshed": [*range(every, stage.steps, every)]} if every else {}

  return trained_once(current, name, params, work)


def with_student_s_encoder(params: Params) -> Params:
  """The parameters, the cross-encoder's encoder a copy of the student's (`model.teacher_from_student`)."""
  teacher: Teacher = jax.tree.map(lambda x: x, params["teacher"])
  teacher.encoder = jax.tree.map(np.array, params["student"].encoder)
  return {**params, "teacher": teacher}


def dev_slice(current: Run) -> Callable[[Params], dict[str, float]]:
  """Measures a student on the first dev queries, over their positives and some other passages drawn from the seed.

  Metrics of the dual-encoder, and as `late.MRR@10` and so on those of late interaction over its best passages.
  """
  e, dev = current.config.evaluate, current.data.queries["dev"]
  some = np.arange(min(e.dev_queries, len(dev.ids)))
  needed = np.unique(dev.positives.take(some).values)
  order = np.random.default_rng(current.config.seed).permutation(len(current.passages))
  others = order[~np.isin(order, needed)][: e.dev_passages]
  chosen = np.sort(np.concatenate([needed, others]))
  queries, passages = current.queries["dev"].take(some), current.passages.take(chosen)
  qrels = first_judged(current, len(some))

  def measure(params: Params) -> dict[str, float]:
    q = current.encode(params, queries, "dev queries", late=True)
    p = current.encode(params, passages, "passages", late=True)
    values, found = topk.top_k(q.vectors, p.vectors, DEPTH)
    best = found[:, : e.late_depth]
    tokens = functools.partial(retrieval.some, retrieval.whole(p))
    again = retrieval.rerank_late(q, best, tokens, each_passage(current, params))
    reranked = retrieval.reorder(chosen[best], again)
    late = evaluate.metrics(current.as_run("dev", *reranked), qrels)
    dual = evaluate.metrics(current.as_run("dev", values, chosen[found]), qrels)
    return dual | {f"late.{name}": x for name, x in late.items()}

  return measure


def first_judged(current: Run, count: int) -> dict[str, dict[str, int]]:
  """The judgements of the first so many dev queries."""
  every = current.data.qrels("dev")
  return {name: every[name] for name in current.data.queries["dev"].ids[:count]}


def each_passage(current: Run, params: Params) -> int:
  """Bytes of the token vectors of a passage, at most."""
  return 2 * current.config.data.passage_length * late_width(params["student"])


def encode_corpus(current: Run, params: Params, place: Path) -> tuple[collection.Collection, dict[str, float]]:
  """The corpus, encoded into the stage's folder; and the dual-encoder's metrics on dev.

  Token vectors are kept if they are not too large: else those of candidates are made when they are re-ranked.
  """
  c = current.config
  small = len(current.passages) * each_passage(current, params) <= collection.SMALL
  student, about = params["student"], ("../prepare", current.data.fingerprint)
  collection.write(place, student, c.model, current.passages, current.template, *about, late="16" if small else "no")
  passages = collection.load(place)
  queries = current.encode(params, current.queries["dev"], "dev queries", late=False)
  found = search(current, queries, passages, DEPTH)
  return passages, current.measure(f"dual.{place.name}", "dev", *found)


def search(
  current: Run, queries: retrieval.Encoded, passages: collection.Collection, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Scores and passage rows [Q, k] of the dual-encoder."""
  return topk.top_k(queries.vectors, passages.vectors, k, order=passages.passages.order)


def token_vectors(current: Run, params: Params, passages: collection.Collection) -> retrieval.Tokens:
  """Those that are kept, or made as they are needed."""
  if passages.tokens is not None:
    return passages.tokens
  return lambda rows: retrieval.whole(current.encode(params, current.passages.take(rows), "passages", late=True))


def encoded_in(name: str) -> str:
  """The stage that encodes the corpus with the student of a training stage."""
  return {"interaction": "mine", "cascade": "encode"}[name]


def mine(current: Run, params: Params, place: Path) -> dict[str, Any]:
  """Hard negatives of the training queries from the interaction-distilled student, as a TREC run."""
  passages, dev = encode_corpus(current, params, place)
  found = mining_blocks(current, params, passages, current.config.seed)
  return {"dev": dev, **write_negatives(current, found, place / NEGATIVES)}


def mining_blocks(
  current: Run, params: Params, passages: collection.Collection, seed: int | list[int]
) -> Iterator[mining.Block]:
  """Mines with a student in the corpus that it encoded."""
  encode = lambda queries: current.encode(params, queries, "training queries", late=False).vectors
  positives = current.data.queries["train"].positives
  queries, settings = current.queries["train"], current.config.mine
  return mining.search(encode, queries, passages, positives, current.identity, settings, seed)


def judged(current: Run, params: Params, found: Iterable[mining.Block]) -> Iterator[mining.Block]:
  """Denoised by a cross-encoder."""
  queries, positives = current.queries["train"], current.data.queries["train"].positives
  return mining.judge(found, params, queries, current.passages, positives, current.template, current.config.mine)


def write_negatives(current: Run, found: Iterable[mining.Block], path: Path) -> dict[str, Any]:
  return mining.write(path, found, current.data.queries["train"].ids, current.data.corpus.ids)


def hard(current: Run, path: Path) -> Ragged:
  """Passage rows of each training query's hard negatives: from the run file, or given (`mine.use`), or both."""
  queries, use = current.data.queries["train"], current.config.mine.use
  if use == "given":
    return queries.negatives
  mined, _ = mining.read(path, queries, current.data.corpus)
  return mined if use == "mined" else mining.joined(mined, queries.negatives)


def denoise(current: Run, params: Params, place: Path) -> dict[str, Any]:
  """The mined negatives without those that the warmed-up cross-encoder takes for right."""
  data = current.data
  path = current.directory / "mine" / NEGATIVES
  found = mining.reread(path, data.queries["train"], data.corpus, current.config.mine)
  result = write_negatives(current, judged(current, params, found), place / NEGATIVES)
  say(f"  {mining.summary(result)}")
  return result


def refresh(current: Run, place: Path, texts: batches.Texts, params: Params | None, done: int) -> batches.Texts:
  """The texts with hard negatives of the student after so many steps: those in the stage's folder, or mined now.

  The corpus that the student encodes for it is left where a killed run finds it, until they are written.
  """
  path, corpus = folder(place / "negatives") / f"{done}.trec", place / "corpus"
  if not mesh.told(mesh.leads() and path.is_file()):
    if params is None:
      raise UserError(f"{path}: is missing; delete {place}, and the stage is trained again")
    say(f"  step {done}: hard negatives again, by the student of now")
    c = current.config
    about = ("../../prepare", current.data.fingerprint)
    collection.write(corpus, params["student"], c.model, current.passages, current.template, *about)
    found = mining_blocks(current, params, collection.load(corpus), [c.seed, done])
    say(
      f"  {mining.summary(write_negatives(current, judged(current, params, found) if c.mine.judged else found, path))}"
    )
  lead(f"{path} is read", lambda: shutil.rmtree(corpus, ignore_errors=True))
  return dataclasses.replace(texts, negatives=hard(current, path))


def check_teacher(current: Run, student_params: Params, teacher_params: Params) -> dict[str, Any]:
  """Teacher and late interaction as re-rankers of the student's top passages on dev: who is the better ranker?

  Chance is the same passages in random order, 20 times.
  """
  e, cascade = current.config.evaluate, current.config.cascade
  store = current.queries["dev"]
  some = np.arange(min(e.teacher_queries, len(store)))
  queries = current.encode(student_params, store.take(some), "dev queries", late=True)
  passages = collection.load(current.directory / "mine")
  values, found = search(current, queries, passages, e.teacher_depth)
  tokens = token_vectors(current, student_params, passages)
  late = retrieval.rerank_late(queries, found, tokens, each_passage(current, student_params))
  alone = retrieval.rerank_cross(teacher_params, store, current.passages, found, current.template)
  ranked = {"student": values, "late": late, "teacher": alone}
  rankers = {"dual": values, "late": late, "cross": alone}
  if cascade.residual:  # it is judged by the score that it teaches; its own has no temperature that could be calibrated
    temperature = dataclasses.asdict(cascade.temperature)
    teacher = np.asarray(losses.corrected(jax.numpy.asarray(alone), jax.numpy.asarray(late), temperature))
    ranked |= {"teacher": teacher, "alone": alone}
    del rankers["cross"]
  qrels = first_judged(current, len(some))
  measured = lambda scores: evaluate.metrics(current.as_run("dev", *retrieval.reorder(found, scores)), qrels)
  scores = {name: measured(each) for name, each in ranked.items()}
  rng = np.random.default_rng(current.config.seed)
  draws = [measured(rng.random(found.shape))["MRR@10"] for _ in range(20)]
  mrr = {name: of["MRR@10"] for name, of in scores.items()}
  where = f"on {len(some)} dev queries, top {e.teacher_depth}"
  warning = teacher_warning(mrr, draws, cascade.on, where)
  queries_of, columns = dev_lists(current, found, cascade)
  heat = temperatures(rankers, queries_of, columns, cascade.temperature)
  for name, of in heat.items():
    say(f"  temperature.{name}={of['used']:g}; calibrated on dev: {of['calibrated']:.3g}")
  surer = surer_than_right(heat, cascade.on, columns.shape[1])
  warning = "; ".join(filter(None, [warning, *surer])) or None
  if warning:
    say(f"  warning: {warning}")
  else:
    gained = f"MRR@10 {mrr['teacher']:.3f} against {mrr['student']:.3f}"
    say(f"  the teacher ranks better than its student: {gained} {where}")
  chance = float(np.mean(draws))
  result = {"depth": e.teacher_depth, "queries": len(some), **scores, "chance": {"MRR@10": chance}}
  return {**result, "temperatures": heat, "warning": warning}


def dev_lists(current: Run, found: np.ndarray, train: config.Train) -> tuple[np.ndarray, np.ndarray]:
  """Lists much as the cascade draws them, from the best passages `found` [Q, k] of the first dev queries.

  The queries [N] that have a positive among them, and columns of `found` [N, K]: the best positive, then negatives
  drawn from the `hardest`, as many as the cascade has or k gives. The cascade's lists hold positives that the student
  does not find, too: these favour the dual-encoder.
  """
  positives, identity = current.data.queries["dev"].positives, current.identity
  negatives = min(train.negatives, found.shape[1] - 1)
  rng = np.random.default_rng(current.config.seed)
  queries, columns = [], []
  for query, row in enumerate(found):
    right = np.isin(identity[row], identity[positives[query]])
    wrong = rng.permutation(np.flatnonzero(~right)[: train.hardest])[:negatives]
    if right.any() and len(wrong) == negatives:
      queries.append(query)
      columns.append([right.argmax(), *wrong])
  return np.array(queries, int), np.reshape(np.array(columns, int), (len(queries), 1 + negatives))


def temperatures(
  rankers: dict[str, np.ndarray], queries: np.ndarray, columns: np.ndarray, temperature: config.Temperatures
) -> dict[str, dict[str, float]]:
  """Of each ranker: the temperature in use, the calibrated one, and what -log p of the positive is with either.

  Rankers that the lists do not calibrate are left out.
  """
  result = {}
  for name, every in rankers.items():
    lists = every[queries[:, None], columns].astype(np.float64)
    used, best = getattr(temperature, name), evaluate.calibrated(lists)
    if best is not None:
      result[name] = {"used": used, "calibrated": best}
      result[name] |= {"loss": evaluate.surprise(lists, used), "calibrated_loss": evaluate.surprise(lists, best)}
  return result


def surer_than_right(heat: dict[str, dict[str, float]], on: Weights, size: int) -> list[str]:
  """A warning for each ranker that teaches and whose probabilities are worse than all alike would be, log K."""
  teaches = {"late": {"kl_li_de"}, "cross": {"kl_ce_li", "kl_ce_de", "kl_listwise", "kl_bidirectional"}}
  return [
    f"temperature.{name}={of['used']:g} makes the {'cross-encoder' if name == 'cross' else 'late interaction'} that "
    f"teaches surer than it is right (-log p of the positive {of['loss']:.2f} in dev lists of {size}; all alike "
    f"{np.log(size):.2f}; its best is {of['calibrated_loss']:.2f} at {of['calibrated']:.2g}): raise it"
    for name, of in heat.items()
    if on.active & teaches.get(name, set()) and of["loss"] > np.log(size)
  ]


def teacher_warning(mrr: dict[str, float], draws: Sequence[float], on: Weights, where: str) -> str | None:
  """What speaks against a teacher of this MRR@10, or None: chance, worse than what it teaches, better left uncorrected.

  `mrr` of `student`, `late`, `teacher`, and of `alone` where the teacher corrects late interaction; `draws`: of random
  orders.
  """
  teacher, late, student = mrr["teacher"], mrr["late"], mrr["student"]
  alone = mrr.get("alone", teacher)
  remedy = "give warmup.steps more, or start from a stronger cross-encoder (model.teacher_start)"
  if teacher < np.mean(draws) + 2 * np.std(draws):
    return f"the teacher ranks at chance (MRR@10 {teacher:.3f} {where}; in random order {np.mean(draws):.3f}): {remedy}"
  if teacher < late and on.active & {"kl_ce_li", "kl_attention"}:
    return (
      f"the teacher ranks worse than the late interaction that it teaches (MRR@10 {teacher:.3f} < {late:.3f}, "
      f"dual-encoder {student:.3f}, {where}): {remedy}"
    )
  if teacher < student:
    return (
      f"the teacher ranks worse than its student (MRR@10 {teacher:.3f} < {student:.3f} {where}): it may hold the "
      f"student back; {remedy}"
    )
  if alone > teacher:
    return (
      f"the cross-encoder alone ranks better than the teacher that adds late interaction to it (MRR@10 "
      f"{alone:.3f} > {teacher:.3f} {where}): set cascade.residual=False"
    )
  return None


def encode(current: Run, params: Params, place: Path) -> dict[str, Any]:
  """The corpus with the cascade's student."""
  return {"dev": encode_corpus(current, params, place)[1]}


def measure_student(current: Run, name: str, params: Params) -> tuple[dict[str, dict[str, float]], np.ndarray]:
  """Test metrics of a training stage's student, dual-encoder and late interaction; the former's passage rows [Q, k]."""
  e = current.config.evaluate
  passages = collection.load(current.directory / encoded_in(name))
  queries = current.encode(params, current.queries["test"], "test queries", late=True)
  values, found = search(current, queries, passages, max(DEPTH, e.late_depth, e.cross_depth))
  tokens = token_vectors(current, params, passages)
  late = retrieval.rerank_late(queries, found[:, : e.late_depth], tokens, each_passage(current, params))
  return {
    "dual": current.measure(f"dual.{name}", "test", values, found),
    "late": current.measure(f"late.{name}", "test", *retrieval.reorder(found[:, : e.late_depth], late)),
  }, found


def measure(current: Run, students: dict[str, Params], best: str, teacher: Params) -> dict[str, Any]:
  """Test metrics of the students, and of the cross-encoder over the better one's list; keeps that model.

  `teacher` are the parameters that hold the cross-encoder, and the student that it was trained with.
  """
  e = current.config.evaluate
  stages: dict[str, dict[str, dict[str, float]]] = {}
  chosen = np.zeros((0, 0), int)
  for name, params in students.items():
    stages[name], found = measure_student(current, name, params)
    chosen = found[:, : e.cross_depth] if name == best else chosen
  model = keep(current, students[best], teacher, best)
  cross = retrieval.rerank_cross(model, current.queries["test"], current.passages, chosen, current.template)
  before = read(current.directory / "baselines" / "manifest.json")
  results = {
    "bm25": before["bm25"],
    "zero_shot": before["zero_shot"],
    **stages[best],
    "cross": current.measure("cross", "test", *retrieval.reorder(chosen, cross)),
    "depth": {"late": e.late_depth, "cross": e.cross_depth},
    "best_stage": best,
    "stages": stages,
  }
  qrels = current.data.qrels("test")
  reread = lambda name: evaluate.read_run(current.directory / "runs" / f"test.{name}.trec")
  dual, bm25 = (evaluate.per_query(reread(name), qrels, "MRR@10") for name in (f"dual.{best}", "bm25"))
  return results | {"dual_minus_bm25": {"MRR@10": evaluate.bootstrap(dual, bm25)}}


def look(current: Run, trained: dict[str, Params], path: Path) -> None:
  """Attention maps of a few test queries, drawn from the seed, with their positives, unless they are there."""
  data, c, test = current.data, current.config, current.data.queries["test"]
  rows = np.sort(np.random.default_rng(c.seed).permutation(len(test.ids))[:3]).tolist()
  best = [int(test.positives[row][0]) for row in rows]
  temperature = (c.cascade.final_temperature or c.cascade.temperature).attention

  def write() -> None:
    if path.is_file():
      return
    texts = [current.queries["test"][row] for row in rows], [current.passages[row] for row in best]
    pairs = attention.record(trained, c.model, *texts, current.template, temperature)
    for pair, row, positive in zip(pairs, rows, best):
      pair |= {"query": test.ids[row], "text": test.texts[row], "passage": data.corpus.ids[positive]}
    folder(path.parent)
    config.write(path, json.dumps({"temperature": temperature, "pairs": pairs}, ensure_ascii=False))

  lead(str(path), write)


def keep(current: Run, student_params: Params, teacher_params: Params, best: str) -> Params:
  """Saves the run's result, `model/`: the student that is best on dev, and the last cross-encoder."""
  student: Student = student_params["student"]
  teacher: Teacher = teacher_params["teacher"]
  settings = current.config.model
  if settings.share_encoder and student is not teacher_params["student"]:
    # The cross-encoder was trained on the other student's encoder: from here on that is its own.
    settings = dataclasses.replace(settings, share_encoder=False)
    shared = teacher_params["student"].encoder
    own = Teacher(shared.architecture, settings, jax.random.key(0))
    own.encoder, own.pooler, own.head = shared, teacher.pooler, teacher.head
    teacher = own
  params = {"student": student, "teacher": teacher}
  place = folder(current.directory / "model")
  about = {
    "student": best,
    "corpus": encoded_in(best),
    "data": dataclasses.asdict(current.config.data),
    "fingerprint": current.data.fingerprint,
  }
  lead("tokenizer", lambda: current.tokenizer.save(place / "tokenizer"))
  lead("model", lambda: checkpoints.save_model(place, params, settings, about))
  return params
