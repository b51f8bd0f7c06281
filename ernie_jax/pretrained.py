"""Released weights under our names: Hugging Face, sentence-transformers, PyLate, PaddleNLP, RocketQA, and runs.

Where a format leaves something open (LayerNorm's epsilon, how a vector is made), the choice is a note, which is shown.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ernie_jax import checkpoints, config, step, unpickle
from ernie_jax.config import UserError, first_line
from ernie_jax.names import (
  EMBEDDINGS,
  HEADS,
  IGNORED,
  LAYER,
  MASKED,
  PADDLE,
  ROCKETQA,
  Arrays,
  renamed,
  transposed,
  turned,
)
from ernie_jax.tokens import MARKERS, Tokenizer

if TYPE_CHECKING:
  from ernie_jax.scores import Params


# Fields of `config.Model` and `config.Data` that go with the weights.
MODEL = ("pooling", "cosine", "dual_width", "late_width", "tied", "teacher_pooler")
DATA = ("query_length", "passage_length", "template", "markers", "augment")
PUNCTUATION = "it leaves punctuation out of passages, which counts here: expect other scores"
ATTENDED = "its tokens read the [MASK]s that fill queries up, which they do not here: expect other scores"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A released model: its shape, its arrays under our names, and how it is meant to be used."""

  architecture: config.Architecture
  encoder: Arrays
  directory: Path  # where its tokenizer lies; or a vocabulary file
  source: str  # what it is called
  pooler: Arrays = dataclasses.field(default_factory=dict)  # of a cross-encoder; empty where there is none
  head: Arrays = dataclasses.field(default_factory=dict)  # its one logit
  projection: Arrays = dataclasses.field(default_factory=dict)  # of late interaction
  reduction: Arrays = dataclasses.field(default_factory=dict)  # of dual-encoder vectors
  query_encoder: Arrays = dataclasses.field(default_factory=dict)  # where queries have one of their own
  masked: Arrays = dataclasses.field(default_factory=dict)  # the head of masked language modelling
  model: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of `config.Model`, as far as it tells them
  data: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )  # of `config.Data`, on the texts that it was trained on
  notes: tuple[str, ...] = ()  # what had to be assumed
  pair: bool = False  # its folder holds a student, and a cross-encoder with an encoder of its own

  def digest(self) -> str:
    """16 hex digits of all its arrays."""
    digest = hashlib.sha256()
    if self.architecture.epsilon != config.Architecture.epsilon:
      digest.update(repr(self.architecture.epsilon).encode())
    for part in (self.encoder, self.pooler, self.head, self.projection, self.reduction, self.query_encoder):
      for name, x in sorted(part.items()):
        digest.update(name.encode() + np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]

  def read_with(self, tokenizer: Tokenizer) -> config.Architecture:
    """The architecture with the tokenizer's special tokens; `UserError` if the weights lack some of its entries."""
    if len(tokenizer) > self.architecture.vocabulary:
      raise UserError(
        f"{self.directory}: the tokenizer has {len(tokenizer)} entries, the weights {self.architecture.vocabulary}; "
        "use the tokenizer that the checkpoint was trained with"
      )
    return dataclasses.replace(self.architecture, special=tokenizer.special)

  def must_read(self, tokenizer: Tokenizer, field: str) -> None:
    """`UserError` unless a cross-encoder's vocabulary is its student's."""
    if Tokenizer.load(self.directory).backend.get_vocab() != tokenizer.backend.get_vocab():
      raise UserError(
        f"{field}: its vocabulary is not the student's, and both read the same tokens; choose one of the same family"
      )

  def against(self, model: config.Model, data: config.Data) -> list[str]:
    """Where a run uses the student otherwise than it was made."""
    used = lambda name, x: (
      name in ("pooling", "cosine") or (name.endswith("_width") and x) or (name == "tied" and not x)
    )
    known = {f"model.{name}": (x, getattr(model, name)) for name, x in self.model.items() if used(name, x)}
    known |= {f"data.{name}": (x, getattr(data, name)) for name, x in self.data.items() if not name.endswith("length")}
    return [f"was made with {field}={x}, this run has {own}" for field, (x, own) in known.items() if own != x]

  def with_layers(self, layers: Sequence[int], field: str) -> Checkpoint:
    """Only these layers, counted from 0; none named: all of them. `field` is the setting that names them."""
    if not layers:
      return self
    count = self.architecture.layers
    config.check(
      all(0 <= i < count for i in layers), field, tuple(layers), f"the checkpoint has layers 0 to {count - 1}"
    )
    take = lambda part: {name: x[list(layers)] if name.startswith("layers.") else x for name, x in part.items()}
    a = dataclasses.replace(self.architecture, layers=len(layers))
    return dataclasses.replace(self, architecture=a, encoder=take(self.encoder), query_encoder=take(self.query_encoder))


def load(directory: Path, source: str, *, teacher: bool = False) -> Checkpoint:
  """Reads a checkpoint of any of these layouts; missing, unknown and mis-shaped tensors are named in one error.

  `teacher` asks for the cross-encoder of a checkpoint that holds a student too; one that holds none gives its encoder.
  """
  for place in (directory / "model", directory):
    if (place / "model.json").is_file():
      return _own(place, source, teacher)
  if (directory / "modules.json").is_file():
    return _modules(directory, source)
  about, old = directory / "config.json", directory / "model_config.json"
  about = old if old.is_file() and not about.is_file() else about
  if "model_checkpoint_path" in _settings(about):
    return _rocketqa(about, source, teacher)
  return _plain(about, source, teacher)


def read_json(path: Path) -> Any:
  """A file of a checkpoint or a run."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"{path}: missing; name a complete checkpoint folder") from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror}); name a complete checkpoint folder") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path}: not valid JSON ({first_line(error)}); get the folder again") from error


def _settings(path: Path) -> dict[str, Any]:
  settings = read_json(path)
  if not isinstance(settings, dict):
    raise UserError(f"{path}: holds no settings; get the folder again")
  return settings


# ---- Layouts -------------------------------------------------------------------------------------------------------


def _own(place: Path, source: str, teacher: bool) -> Checkpoint:
  """The model of a run, or an imported one."""
  params, model, about = checkpoints.load_model(place)
  student, cross = params["student"], params["teacher"]

  def arrays(name: str, module: Any) -> Arrays:
    if module is None or name in about.get("random", ()):
      return {}
    return {own: np.asarray(x) for own, x in checkpoints.named(module).items()}

  own = {"teacher.pooler": cross.pooler, "teacher.head": cross.head}
  if not teacher:
    own |= {f"student.{name}": getattr(student, name) for name in ("projection", "reduction", "query_encoder")}
  encoder = cross.encoder if teacher and cross.encoder is not None else student.encoder
  parts: Any = {name.partition(".")[2]: arrays(name, module) for name, module in own.items()}
  return Checkpoint(
    dataclasses.replace(encoder.architecture, special=()),
    arrays("encoder", encoder),
    place / "tokenizer",
    source,
    **parts,
    model={name: getattr(model, name) for name in MODEL},
    data={name: about["data"].get(name, getattr(config.Data, name)) for name in DATA},
    pair="teacher.head" not in about.get("random", ()),
  )


def _modules(directory: Path, source: str) -> Checkpoint:
  """sentence-transformers' layout (a dual-encoder), and PyLate's (late interaction)."""
  path = directory / "modules.json"
  kind = lambda name: name.rpartition(".")[2]
  try:
    modules = [(kind(own["type"]), _inside(directory, own["path"])) for own in read_json(path)]
    router = modules[0][1] / "router_config.json"
    towers = {}
    if modules[0][0] == "Router":
      routes = read_json(router)
      for route in ("query", "document"):
        own = [(kind(routes["types"][name]), _inside(modules[0][1], name)) for name in routes["structure"][route]]
        towers[route] = own + modules[1:]
  except (KeyError, TypeError, IndexError, AttributeError) as error:
    raise UserError(f"{path}: not what sentence-transformers writes ({first_line(error)})") from error
  if not towers:
    return _tower(modules, directory, source)
  query, passage = (_tower(towers[route], directory, source) for route in ("query", "document"))
  data = {"query_length": query.data.get("passage_length", config.Data.query_length)} | passage.data
  model = passage.model | {"tied": False}
  same = query.architecture == passage.architecture and query.model == passage.model
  if not same or any((query.reduction[name] != x).any() for name, x in passage.reduction.items()):
    raise UserError(
      f"{path}: queries and passages have encoders of different kinds, or a Dense each; that is not supported"
    )
  return dataclasses.replace(passage, query_encoder=query.encoder, model=model, data=data)


def _inside(folder: Path, name: str) -> Path:
  """A path that a checkpoint's file names, which must not lead out of its folder."""
  if Path(name).is_absolute() or ".." in Path(name).parts:
    raise UserError(f"{folder}: names a file outside of it, {name[:80]!r}; get it from another place")
  return folder / name


def _tower(modules: Sequence[tuple[str, Path]], directory: Path, source: str) -> Checkpoint:
  """One encoder of that layout, with what makes vectors of its hidden states."""
  (kind, place), *rest = modules
  if kind != "Transformer":
    raise UserError(f"{directory / 'modules.json'}: begins with {kind}; a Transformer is needed")
  found = _plain(place / "config.json", source, False)
  late = not any(kind == "Pooling" for kind, _ in rest)
  model, data, notes = found.model | {"pooling": "cls", "cosine": False}, {}, list(found.notes)
  dense: Arrays = {}
  settings = directory / "config_sentence_transformers.json"
  about = read_json(settings) if settings.is_file() else {}
  own = place / "sentence_bert_config.json"
  if own.is_file() and (longest := read_json(own).get("max_seq_length")):
    data["passage_length"] = longest
  for kind, part in rest:
    if kind == "Pooling":
      model["pooling"] = _pooling(part / "config.json")
    elif kind == "Dense":
      if dense:
        raise UserError(f"{part}: a second Dense layer; at most one is supported")
      dense = _dense(part, found.architecture.width)
    elif kind == "Normalize":
      model["cosine"] = True
    else:
      raise UserError(
        f"{directory / 'modules.json'}: {kind} is not supported; Transformer, Pooling, Dense, Normalize are"
      )
  if late:
    lengths = {"query_length": "query_length", "passage_length": "document_length"}
    data |= {ours: about[theirs] for ours, theirs in lengths.items() if theirs in about}
    data["augment"] = about.get("do_query_expansion", True)
    prefixes = about.get("query_prefix", "[Q] "), about.get("document_prefix", "[D] ")
  else:
    prompts = about.get("prompts") or {}
    prefixes = prompts.get("query", ""), prompts.get("document", prompts.get("passage", ""))
  data["markers"] = tuple(prefix.strip() for prefix in prefixes) == MARKERS
  if any(prefixes) and not data["markers"]:
    notes.append(f"its texts begin with {' and '.join(map(repr, prefixes))}, left out here: expect other scores")
  if late:
    notes += [PUNCTUATION] * bool(about.get("skiplist_words", True))
    notes += [ATTENDED] * bool(data["augment"] and about.get("attend_to_expansion_tokens"))
    if "bias" in dense:
      raise UserError(f"{directory}: the projection of its token vectors has a bias, which is not supported")
    kernel = dense.get("kernel")
    if kernel is not None and kernel.shape[0] == kernel.shape[1] and (kernel == np.eye(len(kernel))).all():
      dense = {}  # PyLate always wants one
  elif dense:
    dense.setdefault("bias", np.zeros(dense["kernel"].shape[1], np.float32))
  width = dense["kernel"].shape[1] if dense else None
  model |= {"late_width" if late else "dual_width": width}
  found = dataclasses.replace(found, model=model, data=data | found.data, notes=tuple(notes))
  return dataclasses.replace(found, projection=dense) if late else dataclasses.replace(found, reduction=dense)


def _pooling(path: Path) -> str:
  """`model.pooling` of a Pooling module, in its old form or its new one."""
  settings = read_json(path)
  modes = settings.get("pooling_mode") or [
    name.removeprefix("pooling_mode_") for name, on in settings.items() if name.startswith("pooling_mode_") and on
  ]
  known = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
  modes = [modes] if isinstance(modes, str) else modes
  if len(modes) != 1 or modes[0] not in known:
    raise UserError(f"{path}: pooling {' and '.join(modes) or 'none'}; cls or mean is needed")
  return known[modes[0]]


def _dense(place: Path, width: int) -> Arrays:
  """Kernel, and bias if there is one, of a Dense module after an encoder of this width."""
  settings = read_json(place / "config.json")
  if not settings.get("activation_function", "").endswith("Identity") or settings.get("use_residual"):
    raise UserError(
      f"{place / 'config.json'}: a Dense layer with an activation or a residual; only linear ones are read"
    )
  path, raw = _tensors(place)
  weight, bias = raw.get("linear.weight"), raw.get("linear.bias")
  outputs = 0 if weight is None else len(np.atleast_1d(weight))
  wrong = _misfit("linear.weight", weight, (outputs, width))
  wrong += [] if bias is None else _misfit("linear.bias", bias, (outputs,))
  if wrong:
    raise UserError(f"{path}: {'; '.join(wrong)}; download the checkpoint again")
  return _linear(raw, "linear")


def _rocketqa(about: Path, source: str, teacher: bool) -> Checkpoint:
  """RocketQA's folder: `config.json` names the encoder's configuration, the vocabulary and the folder of variables."""
  settings = _settings(about)
  try:
    place, shape, vocabulary = (
      _inside(about.parent, settings[f"model_{name}_path"]) for name in ("checkpoint", "conf", "vocab")
    )
    files = sorted(path.name for path in place.iterdir())
  except KeyError as error:
    raise UserError(f"{about}: lacks {error}; download the checkpoint again") from error
  except (TypeError, ValueError) as error:
    raise UserError(f"{about}: a path that is none ({first_line(error)}); download the checkpoint again") from error
  except OSError as error:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); download the checkpoint again") from error
  # The joint model of RocketQAv2 holds all three; cross-encoders have no prefix, or that of the joint model.
  prefixes = [p for p in ("query_", "titlepara_", "qtp_") if f"{p}word_embedding" in files]
  main = "qtp_" if teacher and "qtp_" in prefixes else "titlepara_" if "titlepara_" in prefixes else ""
  untied = not teacher and {"query_", "titlepara_"} <= set(prefixes) and not settings.get("share_parameter")
  query = "query_" if untied else None
  if f"{main}word_embedding" not in files:
    raise UserError(f"{place}: holds no encoder: {main}word_embedding is missing; name the folder of one")

  def tower(prefix: str | None) -> Arrays:
    if prefix is None:
      return {}
    names = {}
    own = (prefix,) if prefix == "qtp_" else (prefix, "pooled_fc")  # the joint model's has no pooler
    for file in files:
      name = renamed(file.removeprefix(prefix) if file.startswith(own) else "", ROCKETQA)
      if name.endswith((".weight", ".bias")):  # optimizers leave files too
        names[file] = name
    raw = unpickle.variables(place, names)
    return {names[file]: turned(names[file], x) for file, x in raw.items()}

  lengths = {"query_length": "q_max_seq_len", "passage_length": "p_max_seq_len"}
  try:
    data = {ours: _number(settings, theirs) for ours, theirs in lengths.items() if theirs in settings}
  except UserError as error:
    raise UserError(f"{about}: {error}") from error
  found = _checkpoint(tower(main), tower(query), shape, place, vocabulary, source, teacher)
  notes = found.notes
  if settings.get("for_cn"):
    notes += ("RocketQA takes the spaces out of its texts (for_cn), which stay here: other scores for Latin words",)
  pair = {"titlepara_", "qtp_"} <= set(prefixes)
  return dataclasses.replace(found, data=found.data | data, notes=notes, pair=pair)


def _plain(about: Path, source: str, teacher: bool) -> Checkpoint:
  """Hugging Face's layout and PaddleNLP's."""
  settings, directory = _settings(about), about.parent
  path, raw = _tensors(directory)
  if path.suffix == ".pdparams":
    query = {name: x for name, x in raw.items() if name.startswith("query_ernie.")}
    main = {name: x for name, x in raw.items() if name not in query} or query

    def tower(raw: Arrays) -> Arrays:
      found: Arrays = {}
      for name, x in raw.items():
        theirs = renamed(re.sub(r"^((query_|title_)?ernie\.)+", "", name), PADDLE)
        if theirs in found:
          raise UserError(f"{path}: {name} is there twice, with another prefix; keep one encoder of them")
        found[theirs] = turned(theirs, x)
      return found

    passages, queries = tower(main), {} if main is query else tower(query)
    equal = lambda name: name in queries and name in passages and np.array_equal(queries[name], passages[name])
    every = passages.keys() | queries.keys() if queries else set()
    if any(name.startswith("emb_reduce_linear.") and not equal(name) for name in every):
      raise UserError(f"{path}: queries and passages have an emb_reduce_linear each; one for both is supported")
    if all(equal(name) or IGNORED.match(name) for name in every):  # one encoder, written twice
      queries = {}
    return _checkpoint(passages, queries, about, path, directory, source, teacher)
  if settings.get("model_type") not in ("bert", "ernie"):
    raise UserError(f"{about}: model_type {settings.get('model_type')!r}; bert or ernie is needed")
  # Old checkpoints call a norm's scale gamma and its shift beta.
  old = ((r"^(bert|ernie)\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
  theirs = {renamed(name, old): x for name, x in raw.items()}
  found = _checkpoint(theirs, {}, about, path, directory, source, teacher)
  model, data = exported(settings)
  found = dataclasses.replace(found, model=found.model | model, data=data)
  return _colbert(found, directory) if settings.get("architectures") == ["HF_ColBERT"] else found


def _colbert(found: Checkpoint, directory: Path) -> Checkpoint:
  """ColBERT's own settings, which lie beside its weights."""
  path = directory / "artifact.metadata"
  about = _settings(path) if path.is_file() else {}
  lengths = {"query_length": "query_maxlen", "passage_length": "doc_maxlen"}
  data = {ours: about[theirs] for ours, theirs in lengths.items() if isinstance(about.get(theirs), int)}
  notes = [PUNCTUATION] * bool(about.get("mask_punctuation", True)) + [ATTENDED] * bool(
    about.get("attend_to_mask_tokens")
  )
  return dataclasses.replace(found, data=data | {"markers": True, "augment": True}, notes=(*found.notes, *notes))


def _tensors(directory: Path) -> tuple[Path, Arrays]:
  """The arrays of a folder, and the file that holds them, or says which files do."""
  for name, read in (("model.safetensors", _safetensors), ("pytorch_model.bin", unpickle.torch)):
    if (path := directory / name).is_file():
      return path, read(path)
    if (path := directory / f"{name}.index.json").is_file():
      weights = _settings(path).get("weight_map")
      shards = list(weights.values()) if isinstance(weights, dict) else []
      if not shards or any(not isinstance(own, str) or Path(own).name != own for own in shards):
        raise UserError(f"{path}: names no files beside it; download the checkpoint again")
      return path, {key: x for own in sorted(set(shards)) for key, x in read(directory / own).items()}
  paddle = sorted(directory.glob("*.pdparams"))
  if len(paddle) > 1:
    raise UserError(
      f"{directory}: holds {len(paddle)} .pdparams files; keep the one that is meant, with its config.json"
    )
  if not paddle:
    raise UserError(f"{directory / 'model.safetensors'}: missing, and no pytorch_model.bin and no .pdparams is there")
  return paddle[0], unpickle.paddle(paddle[0])


def _safetensors(path: Path) -> Arrays:
  from safetensors import SafetensorError
  from safetensors.flax import load_file as load_bfloat16
  from safetensors.numpy import load_file

  try:
    try:
      return load_file(path)
    except KeyError:  # a number type numpy lacks
      return {name: np.asarray(x, np.float32) for name, x in load_bfloat16(path).items()}
  except FileNotFoundError as error:
    raise UserError(f"{path}: missing; download the checkpoint again") from error
  except (SafetensorError, TypeError, KeyError, ValueError) as error:
    raise UserError(f"{path}: damaged ({first_line(error)}); download the checkpoint again") from error


# ---- From names and shapes to a checkpoint -------------------------------------------------------------------------


def _checkpoint(
  theirs: Arrays, query: Arrays, about: Path, path: Path, tokenizer: Path, source: str, teacher: bool
) -> Checkpoint:
  """From arrays under Hugging Face's names (`query`: of a second encoder), which `path` holds, and a configuration."""
  notes = []
  parts: Any = {ours: _linear(theirs, name) for ours, name in HEADS.items()}
  paddle = path.suffix == ".pdparams" or path.is_dir()
  classes = parts["head"]["kernel"].shape[-1:] if "kernel" in parts["head"] else ()
  if paddle and teacher and classes == (2,):
    # softmax(l)[1] = sigmoid(l1 - l0)
    parts["head"] = {name: x[..., 1:] - x[..., :1] for name, x in parts["head"].items()}
    notes.append("its two classes are one logit here, their difference: the same ranking")
  elif classes != (1,):
    parts["head"] = {}  # classes of another task
  if (kernel := parts["reduction"].get("kernel")) is not None and "bias" not in parts["reduction"]:
    parts["reduction"]["bias"] = np.zeros(kernel.shape[-1:], np.float32)
  known = _retrieval(source, path, parts) if paddle else ""
  if teacher and parts["pooler"] and re.search("rocketqa.?v2", _called(source, path)):
    parts["pooler"] = {}
    notes.append("its pooler is left out: RocketQAv2's cross-encoder reads the first token's state itself")
  if known:
    notes.append(f"LayerNorm's epsilon is 1e-05, as in RocketQA's and ERNIE-Search's models ({known})")
  a = _architecture(about, len(np.atleast_1d(theirs.get(EMBEDDINGS["task.embedding"], ()))), 1e-5 if known else None)
  wrong: list[str] = []
  encoder = _encoder(theirs, a, wrong, "")
  query_encoder = _encoder(query, a, wrong, "query encoder's ") if query else {}
  for ours, name in HEADS.items():
    weight, bias = (theirs.get(f"{name}.{end}") for end in ("weight", "bias"))
    if not parts[ours] and (weight is not None or bias is None):
      continue  # not there, or of another task
    outputs = a.width if ours == "pooler" else 1 if weight is None else len(np.atleast_1d(weight))
    wrong += _misfit(f"{name}.weight", weight, (outputs, a.width))
    if bias is not None and ours == "projection":
      wrong.append(f"{name}.bias (a projection has none)")
    elif bias is not None or ours in ("pooler", "head"):
      wrong += _misfit(f"{name}.bias", bias, (outputs,))
  if wrong:
    some = "; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else "")
    raise UserError(f"{path}: {len(wrong)} tensors do not fit {about.name}: {some}")
  widths = {ours: parts[ours]["kernel"].shape[1] if parts[ours] else None for ours in ("reduction", "projection")}
  model = {
    **({"pooling": "cls", "cosine": False} if known else {}),
    "dual_width": widths["reduction"],
    "late_width": widths["projection"],
    "tied": not query,
    "teacher_pooler": bool(parts["pooler"]),
  }
  return Checkpoint(
    a, encoder, tokenizer, source, **parts, query_encoder=query_encoder, masked=_masked(theirs), model=model,
    data={"template": "rocketqa"} if known else {}, notes=tuple(notes),
  )  # fmt: skip


def exported(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Fields of `config.Model` and of `config.Data` that `export` wrote into a configuration, under a key of our own."""
  own = settings.get("ernie_jax")
  own = own if isinstance(own, dict) else {}
  fits = lambda kind, name: name in own and isinstance(own[name], type(getattr(kind, name)))
  model = {name: own[name] for name in ("pooling", "cosine") if fits(config.Model, name)}
  return model, {name: own[name] for name in DATA if fits(config.Data, name)}


def _architecture(about: Path, tasks: int, epsilon: float | None) -> config.Architecture:
  """The encoder's shape as a configuration tells it, with so many task types; None is the configuration's epsilon."""
  settings = _settings(about)
  inside = settings.get("init_args")  # of PaddleNLP before 2.5: nested once, or twice
  while isinstance(inside, list) and inside and isinstance(inside[0], dict):
    settings, inside = inside[0] | settings, inside[0].get("init_args")
  activation, positions = settings.get("hidden_act", "gelu"), settings.get("position_embedding_type", "absolute")
  if activation not in ("gelu", "relu"):
    raise UserError(f"{about}: hidden_act {activation!r}; gelu or relu is needed")
  if positions != "absolute":
    raise UserError(f"{about}: position_embedding_type {positions!r}; absolute is needed")
  number = functools.partial(_number, settings)
  try:
    return config.Architecture(
      vocabulary=number("vocab_size"),
      width=number("hidden_size"),
      layers=number("num_hidden_layers"),
      heads=number("num_attention_heads"),
      inner=number("intermediate_size") if settings.get("intermediate_size") else 4 * number("hidden_size"),
      positions=number("max_position_embeddings"),
      types=number("sent_type_vocab_size" if settings.get("sent_type_vocab_size") else "type_vocab_size"),
      tasks=tasks,
      activation=activation,
      epsilon=number("layer_norm_eps", 1e-12) if epsilon is None else epsilon,
      dropout=number("hidden_dropout_prob", 0.1),
      attention_dropout=number("attention_probs_dropout_prob", 0.1),
    )
  except UserError as error:
    raise UserError(f"{about}: {error}") from error


def _number(settings: dict[str, Any], field: str, default: float | None = None) -> Any:
  """A field that counts something; with a default, a share or the like. `UserError` if it is neither."""
  value = settings.get(field, default)
  if value is None:
    raise UserError(f"lacks {field!r}; not a BERT or ERNIE configuration")
  kind, least, most = (int, 1, 2**31) if default is None else (int | float, 0, 1)
  if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < most:
    raise UserError(f"{field}={value!r} is no number that fits; download the checkpoint again")
  return value


def _retrieval(source: str, path: Path, parts: dict[str, Arrays]) -> str:
  """Why a Paddle checkpoint is one of RocketQA's or ERNIE-Search's; empty if nothing says so.

  They were trained with Paddle's default epsilon. PaddleNLP sets 1e-12 where it loads other ERNIE models, and writes
  that into every configuration.
  """
  if path.is_dir():
    return "one file for each variable"
  if parts["reduction"]:
    return "emb_reduce_linear"
  if parts["head"]:
    return "a ranking head"
  found = re.search(r"rocketqa|ernie.search", _called(source, path))
  return f"named {found[0]}" if found else ""


def _called(source: str, path: Path) -> str:
  """A checkpoint's names: its own in a hub, its folder's and its file's."""
  return f"{source.rpartition('/')[2]} {path.resolve().parent.name} {path.name}".lower()


def _linear(theirs: Arrays, name: str) -> Arrays:
  """Kernel [in, out] and bias of a linear layer, as far as they are there."""
  found = {}
  if (weight := theirs.get(f"{name}.weight")) is not None:
    found["kernel"] = np.asarray(weight.T, np.float32)
    if (bias := theirs.get(f"{name}.bias")) is not None:
      found["bias"] = np.asarray(bias, np.float32)
  return found


def _masked(theirs: Arrays) -> Arrays:
  """The head of masked language modelling if all of it is there; nobody else asks for it, so it is no error."""
  found = {ours: theirs[name] for ours, name in MASKED.items() if name in theirs}
  return {ours: np.asarray(turned(MASKED[ours], x), np.float32) for ours, x in found.items()} if len(found) == 5 else {}


def _encoder(theirs: Arrays, a: config.Architecture, wrong: list[str], whose: str) -> Arrays:
  """The encoder's arrays under our names; what is missing, unknown or of another shape is appended to `wrong`."""
  wanted = shapes(a)
  used: set[str] = set()

  def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
    used.add(name)
    x = theirs.get(name)
    x = x if x is None or not transposed(name) else x.T
    if found := _misfit(whose + name, x, shape):
      wrong.extend(found)
      return np.broadcast_to(np.float32(0), shape)
    return np.asarray(x, np.float32)

  tensors = {ours: take(EMBEDDINGS[ours], wanted[ours]) for ours in EMBEDDINGS if ours in wanted}
  for ours, name in LAYER.items():
    parts = [take(name.format(i), wanted[ours][1:]) for i in range(a.layers)]
    tensors[ours] = np.stack(parts) if not wrong else parts[0]
  more = [name for name in theirs if name not in used and not IGNORED.match(name)]
  wrong += [f"{whose}{name} (unknown)" for name in more]
  return tensors


def _misfit(name: str, x: np.ndarray | None, shape: tuple[int, ...]) -> list[str]:
  """What is wrong with a tensor, if anything."""
  if x is None:
    return [f"{name} (missing)"]
  if x.shape != shape:
    return [f"{name} ({x.shape} instead of {shape})"]
  return [] if x.dtype.kind == "f" else [f"{name} ({x.dtype} instead of float32)"]


def shapes(a: config.Architecture) -> dict[str, tuple[int, ...]]:
  """Name and shape of every encoder parameter."""
  from ernie_jax.encoder import Encoder

  tree = jax.eval_shape(lambda: Encoder(a, jax.random.key(0)))
  return dict(zip(jax.tree.leaves(step.names(tree)), (x.shape for x in jax.tree.leaves(tree))))


def assign(params: Params, student: Checkpoint | None, teacher: Checkpoint | None) -> tuple[Params, list[str]]:
  """Parameters with the checkpoints' arrays in place of random ones, and the parts that no checkpoint brings.

  Those stay random, and are named as `student.projection` or `teacher.head`.
  """
  arrays: Arrays = {}

  def bring(part: str, own: Arrays) -> None:
    arrays.update({f"{part}.{name}": x for name, x in own.items()})

  if student is not None:
    bring("student.encoder", student.encoder)
    bring("student.query_encoder", student.query_encoder or student.encoder)
    bring("student.projection", student.projection)
    bring("student.reduction", student.reduction)
    bring("masked", student.masked)
  if teacher is not None:
    bring("teacher.encoder", teacher.encoder)
    bring("teacher.pooler", teacher.pooler)
    bring("teacher.head", teacher.head)
  left = []

  def replace(name: str, old: jax.Array) -> jax.Array:
    new = arrays.get(name)
    if new is None or new.shape != old.shape:
      left.append(".".join(name.split(".")[:2]))
      return old
    return jax.device_put(new.astype(old.dtype), old.sharding)

  filled = jax.tree.map(replace, step.names(params), params)
  return filled, list(dict.fromkeys(left))


def adopt(
  student: Checkpoint, cross: Checkpoint | None, model: config.Model, data: config.Data, output: Path
) -> list[str]:
  """Saves a model made of released weights in `output/model`; gives the parts that stay random, as `assign` does."""
  tokenizer = Tokenizer.load(student.directory)
  if cross is not None:
    cross.must_read(tokenizer, "--cross")
  own, other = student.read_with(tokenizer), (cross or student).read_with(tokenizer)
  for a in (own, other):
    data.fits(a)
  params, random = assign(step.init_params(model, own, other, jax.random.key(0)), student, cross)
  place = output / "model"
  about = {"data": dataclasses.asdict(data), "random": random, "source": [c.source for c in (student, cross) if c]}
  tokenizer.save(place / "tokenizer")
  checkpoints.save_model(place, params, model, about)
  return random
