"""A trained model for the tools that people use: sentence-transformers, PyLate, CrossEncoder, transformers, ONNX.

Each layout is one of that tool's own, with a model card; `pretrained.load` reads the first four back, bit for bit (an
`hf` with two encoders folder by folder).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ernie_jax import checkpoints, config, graph, names
from ernie_jax.config import UserError
from ernie_jax.encoder import Encoder
from ernie_jax.names import Arrays
from ernie_jax.pretrained import DATA, read_json
from ernie_jax.search import Model
from ernie_jax.tokens import MARKERS

Layout = Literal["sentence-transformers", "pylate", "cross-encoder", "hf", "onnx"]
MODULES = "sentence_transformers.models."  # where every version finds them


class Card(NamedTuple):
  """What a layout's model card says of it."""

  system: Literal["dual", "late", "cross"]
  library: str
  task: str
  code: str  # loads it; PLACE stands for the folder
  note: str = ""  # where the tool does other than training did


def export(run: Path, to: Layout, output: Path) -> None:
  """Writes a run's model into a new folder in a tool's layout: all of it, or nothing.

  Raises:
    UserError: `output` holds something, or the layout cannot express the model.
  """
  output = output.resolve()
  config.must_be_new(output)
  model = Model.load(run)
  layouts: dict[Layout, Callable[[Model, Path], Card]] = {
    "sentence-transformers": sentence_transformers,
    "pylate": pylate,
    "cross-encoder": cross_encoder,
    "hf": hugging_face,
    "onnx": onnx,
  }
  folder = output.with_name(f"{output.name}.writing-{os.getpid()}")
  try:
    folder.mkdir(parents=True)
    card = layouts[to](model, folder)
    home = run.parent if (run / "model.json").is_file() else run  # of a run's folder model/
    config.write(folder / "README.md", _card(model, home, card).replace("PLACE", output.name))
    if output.exists():
      output.rmdir()
    folder.rename(output)
  except OSError as error:
    raise UserError(f"{output}: cannot be written ({error.strerror or error}); choose another place") from error
  finally:
    shutil.rmtree(folder, ignore_errors=True)


# ---- Layouts -------------------------------------------------------------------------------------------------------


def sentence_transformers(model: Model, folder: Path) -> Card:
  """The dual-encoder: Transformer, Pooling, Dense where vectors are reduced, Normalize where they have unit length."""
  student, d, cosine = model.params["student"], model.template.data, model.settings.cosine
  if d.markers and d.template == "rocketqa":
    raise UserError("--to sentence-transformers: its prompts cannot stand before a title and a text; export it to onnx")
  prompts = dict(zip(("query", "document"), (f"{token} " for token in MARKERS))) if d.markers else {}
  similarity = "cosine" if cosine else "dot"
  about = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": similarity}
  _json(folder / "config_sentence_transformers.json", about)

  def tower(encoder: Encoder, length: int, place: Callable[[int, str], str]) -> list[tuple[str, str]]:
    """Writes the modules of an encoder; their types and folders."""
    kinds = ["Transformer", "Pooling"] + ["Dense"] * (student.reduction is not None) + ["Normalize"] * cosine
    modules = [(MODULES + kind, place(i, kind)) for i, kind in enumerate(kinds)]
    for kind, (_, path) in zip(kinds, modules):
      (folder / path).mkdir(exist_ok=True)
      if kind == "Transformer":
        _transformer(folder / path, encoder, model, length)
        _limits(folder / path, length)
      elif kind == "Pooling":
        modes = {
          f"pooling_mode_{mode}": mode.startswith(model.settings.pooling) for mode in ("cls_token", "mean_tokens")
        }
        _json(folder / path / "config.json", {"word_embedding_dimension": encoder.architecture.width} | modes)
      elif kind == "Dense":
        _dense(folder / path, student.reduction.kernel, student.reduction.bias)
    return modules

  if student.query_encoder is None:
    modules = tower(student.encoder, d.passage_length, lambda i, kind: f"{i}_{kind}" if i else "")
  else:
    routes = {
      "query": tower(student.query_encoder, d.query_length, lambda i, kind: f"query_{i}_{kind}"),
      "document": tower(student.encoder, d.passage_length, lambda i, kind: f"document_{i}_{kind}"),
    }
    _json(folder / "router_config.json", {
      "types": {path: kind for route in routes.values() for kind, path in route},
      "structure": {name: [path for _, path in route] for name, route in routes.items()},
      "parameters": {"default_route": "document", "allow_empty_key": True},
    })  # fmt: skip
    modules = [(f"{MODULES}Router", "")]
  _modules(folder, modules)
  tied = student.query_encoder is None
  return Card(
    "dual", "sentence-transformers", "sentence-similarity",
    f"""from sentence_transformers import SentenceTransformer
model = SentenceTransformer("PLACE")
print(model.similarity(model.encode_query(["a query"]), model.encode_document([{_passage(d)}])))""",
    f" With `model.max_seq_length = {d.query_length}`, longer queries are cut as they were." if tied else "",
  )  # fmt: skip


def pylate(model: Model, folder: Path) -> Card:
  """Late interaction: a Transformer and a Dense layer, which PyLate adds at random where there is none."""
  student, d = model.params["student"], model.template.data
  if student.query_encoder is not None:
    raise UserError("--to pylate: PyLate has one encoder for queries and passages, this model two; export it to onnx")
  _transformer(folder, student.encoder, model, d.passage_length)
  _limits(folder, d.passage_length)
  (folder / "1_Dense").mkdir()
  width = student.encoder.architecture.width
  _dense(folder / "1_Dense", np.eye(width) if student.projection is None else student.projection.kernel)
  _modules(folder, [(f"{MODULES}Transformer", ""), ("pylate.models.Dense.Dense", "1_Dense")])
  _json(folder / "config_sentence_transformers.json", {
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "query_prefix": MARKERS[0] if d.markers else "",
    "document_prefix": MARKERS[1] if d.markers else "",
    "query_length": d.query_length,
    "document_length": d.passage_length,
    "do_query_expansion": d.augment,
    "attend_to_expansion_tokens": False,
    "skiplist_words": [],  # punctuation counts
  })  # fmt: skip
  return Card(
    "late", "PyLate", "sentence-similarity",
    f"""from pylate import models
model = models.ColBERT("PLACE")
print((model.encode(["a query"])[0] @ model.encode([{_passage(d)}], is_query=False)[0].T).max(1).sum())""",
  )  # fmt: skip


def cross_encoder(model: Model, folder: Path) -> Card:
  """The cross-encoder: transformers' sequence classification with one logit, which CrossEncoder gives as it is."""
  teacher, encoder = _teacher(model, "cross-encoder")
  if teacher.pooler is None:
    raise UserError(
      "--to cross-encoder: BERT's class has a pooler before the logit, this model none (model.teacher_pooler); "
      "export it to onnx"
    )
  heads = _linear("pooler.dense", teacher.pooler.kernel, teacher.pooler.bias)
  heads |= _linear("classifier", teacher.head.kernel, teacher.head.bias)
  raw = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}}
  labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
  _transformer(
    folder, encoder, model, model.template.data.pair_length, "ForSequenceClassification", heads, raw | labels
  )
  return Card(
    "cross", "sentence-transformers", "text-ranking",
    """from sentence_transformers import CrossEncoder
model = CrossEncoder("PLACE")
print(model.predict([("a query", "a passage")]))""",
    " CrossEncoder cuts only what does not fit into both lengths together: of a long passage with a short query it "
    "reads more than was read in training.",
  )  # fmt: skip


def hugging_face(model: Model, folder: Path) -> Card:
  """The student's encoder, for `AutoModel`; two where queries have one of their own."""
  student, d = model.params["student"], model.template.data
  if student.query_encoder is None:
    _transformer(folder, student.encoder, model, d.passage_length)
  else:
    for name, encoder, length in (
      ("query", student.query_encoder, d.query_length),
      ("passage", student.encoder, d.passage_length),
    ):
      (folder / name).mkdir()
      _transformer(folder / name, encoder, model, length)
  place = "PLACE" if student.query_encoder is None else "PLACE/passage"
  return Card(
    "dual", "transformers", "feature-extraction",
    f"""from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("{place}"), AutoModel.from_pretrained("{place}")
print(model(**tokenizer("a passage", return_tensors="pt")).last_hidden_state)""",
    " The map of its vector to fewer dimensions is not part of this folder." if student.reduction is not None else "",
  )  # fmt: skip


def onnx(model: Model, folder: Path) -> Card:
  """Each scorer as a graph of its own, for any batch and length, with the tokenizer."""
  student, settings = model.params["student"], model.settings
  towers = {"": False} if student.query_encoder is None else {".query": True, ".passage": False}
  for name, query in towers.items():
    config.write(folder / f"dual{name}.onnx", graph.dual(student, settings, query=query).SerializeToString())
    config.write(folder / f"late{name}.onnx", graph.late(student, query=query).SerializeToString())
  if model.crosses:
    config.write(folder / "cross.onnx", graph.cross(model.params).SerializeToString())
  _tokenizer(folder, model, model.template.data.pair_length)
  return Card(
    "dual", "onnx", "sentence-similarity",
    f"""import onnxruntime, transformers
inputs = transformers.AutoTokenizer.from_pretrained("PLACE")(["a passage"], return_tensors="np")
print(onnxruntime.InferenceSession("PLACE/dual{next(reversed(towers))}.onnx").run(None, dict(inputs)))""",
  )  # fmt: skip


# ---- Parts of layouts ----------------------------------------------------------------------------------------------


def _teacher(model: Model, to: str) -> tuple[Any, Encoder]:
  """The cross-encoder, and its encoder."""
  if not model.crosses:
    raise UserError(f"--to {to}: this model has no trained cross-encoder; import one with --cross")
  teacher = model.params["teacher"]
  return teacher, teacher.encoder or model.params["student"].encoder


def _transformer(
  folder: Path,
  encoder: Encoder,
  model: Model,
  length: int,
  task: str = "Model",
  heads: Arrays | None = None,
  more: dict[str, Any] | None = None,
) -> None:
  """Configuration, weights and tokenizer as transformers reads them: `BertModel`, or `ErnieModel` with its tasks."""
  from safetensors.numpy import save

  a, data = encoder.architecture, model.template.data
  kind = "ernie" if a.tasks else "bert"
  # What no field of theirs says, for a later import.
  settings = {name: getattr(data, name) for name in DATA}
  settings |= {name: getattr(model.settings, name) for name in ("pooling", "cosine")}
  arrays = names.released({name: np.asarray(x) for name, x in checkpoints.named(encoder).items()})
  arrays = {f"{kind}.{name}": x for name, x in arrays.items()} if heads else arrays
  pooler = {f"{kind}.{name}" if name.startswith("pooler") else name: x for name, x in (heads or {}).items()}
  config.write(folder / "model.safetensors", save(arrays | pooler, metadata={"format": "pt"}))
  _json(folder / "config.json", {
    "architectures": [f"{kind.title()}{task}"],
    "model_type": kind,
    "vocab_size": a.vocabulary,
    "hidden_size": a.width,
    "num_hidden_layers": a.layers,
    "num_attention_heads": a.heads,
    "intermediate_size": a.inner,
    "max_position_embeddings": a.positions,
    "type_vocab_size": a.types,
    **({"use_task_id": True, "task_type_vocab_size": a.tasks} if a.tasks else {}),
    "hidden_act": a.activation,
    "layer_norm_eps": a.epsilon,
    "hidden_dropout_prob": a.dropout,
    "attention_probs_dropout_prob": a.attention_dropout,
    "pad_token_id": model.template.tokenizer.pad,
    "torch_dtype": "float32",
    "ernie_jax": settings,
    **(more or {}),
  })  # fmt: skip
  _tokenizer(folder, model, length)


def _tokenizer(folder: Path, model: Model, length: int) -> None:
  """The tokenizer, which adds the special tokens of a text or a pair itself."""
  tokenizers, t = model.template.tokenizer.backend.__class__, model.template.tokenizer
  from tokenizers.processors import TemplateProcessing

  backend = tokenizers.from_str(t.backend.to_str())
  backend.post_processor = TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", t.cls), ("[SEP]", t.sep)]
  )
  written = json.loads(backend.to_str())
  if model.template.data.markers:  # to be found in a text, where special tokens are not
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = [own for own in written["added_tokens"] if own["content"] not in MARKERS]
    added += [{"id": number, "content": token, **plain} for token, number in zip(MARKERS, t.markers())]
    written["added_tokens"] = sorted(added, key=lambda own: own["id"])
  config.write(folder / "tokenizer.json", json.dumps(written, indent=2, ensure_ascii=False))
  _json(folder / "tokenizer_config.json", {
    "tokenizer_class": "PreTrainedTokenizerFast",  # as the file says: BERT's class would lower-case again
    "model_max_length": length,
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
    "split_special_tokens": True,  # a text that says "[SEP]" is a text
  })  # fmt: skip


def _linear(name: str, kernel: Any, bias: Any = None) -> Arrays:
  """A linear layer as torch has it."""
  found = {f"{name}.weight": np.ascontiguousarray(np.asarray(kernel, np.float32).T)}
  return found if bias is None else found | {f"{name}.bias": np.asarray(bias)}


def _dense(folder: Path, kernel: Any, bias: Any = None) -> None:
  from safetensors.numpy import save

  arrays = _linear("linear", kernel, bias)
  config.write(folder / "model.safetensors", save(arrays, metadata={"format": "pt"}))
  outputs, inputs = arrays["linear.weight"].shape
  _json(folder / "config.json", {
    "in_features": inputs, "out_features": outputs, "bias": bias is not None,
    "activation_function": "torch.nn.modules.linear.Identity",
  })  # fmt: skip


def _limits(folder: Path, length: int) -> None:
  """What a Transformer module of sentence-transformers has beside transformers' files."""
  settings = {"max_seq_length": length, "do_lower_case": False, "model_args": {"add_pooling_layer": False}}
  _json(folder / "sentence_bert_config.json", settings)


def _modules(folder: Path, modules: list[tuple[str, str]]) -> None:
  _json(folder / "modules.json", [
    {"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(modules)
  ])  # fmt: skip


def _json(path: Path, content: Any) -> None:
  config.write(path, json.dumps(content, indent=2))


# ---- The model card ------------------------------------------------------------------------------------------------


def _passage(d: config.Data) -> str:
  """A passage in Python, as sentence-transformers' tokenizers take it."""
  return '"a title: a text"' if d.template == "bert" else '("a title", "a text")'


def _card(model: Model, run: Path, card: Card) -> str:
  """What the model is, how it is loaded, what was measured, and how it was made."""
  kind = {"dual": "dual-encoder", "late": "late-interaction model", "cross": "cross-encoder"}[card.system]
  d, settings = model.template.data, model.settings
  vector = "the first token's" if settings.pooling == "cls" else "the mean of all tokens'"
  vector += f", mapped to {settings.dual_width} dimensions" if settings.dual_width else ""
  similarity = "cosine" if settings.cosine else "dot product"
  about = f" A text's vector is {vector}; vectors are compared by {similarity}." if card.system == "dual" else ""
  apart = "title text" if card.system == "cross" else "title [SEP] text, the text of type 1"
  imported = model.about.get("source")
  made = [] if imported else [f"- data: {d.name}, fingerprint `{model.about.get('fingerprint', 'not known')}`"]
  made += [f"- weights: `{own}`" for own in imported or [settings.start or "random"]]
  lines = "\n".join(made)
  return f"""---
library_name: {card.library}
pipeline_tag: {card.task}
tags: [ernie-search, ernie_jax, retrieval]
---

# A {kind} of ernie_jax

ERNIE-Search ([arXiv 2205.09153](https://arxiv.org/abs/2205.09153)): a cross-encoder teaches a late-interaction model
that teaches a dual-encoder.

```python
{card.code}
```

Queries were cut at {d.query_length} tokens, passages at {d.passage_length}; a passage is
{"`title: text`" if d.template == "bert" else apart}.{about}{card.note}

## Measured

{_measured(run, card.system)}

## Made from

{lines}

<details><summary>Configuration</summary>

```json
{json.dumps(_configuration(model, run), indent=2)}
```

</details>
"""


def _measured(run: Path, system: str) -> str:
  """The metrics of the run's test split, as a table."""
  if not (run / "metrics.json").is_file():
    return "Nothing: the model was not trained here."
  found = read_json(run / "metrics.json")
  rows = [name for name in ("bm25", "zero_shot", system) if name in found]
  measures = list(found[rows[0]])
  lines = [f"| test split | {' | '.join(measures)} |", "|---" * (1 + len(measures)) + "|"]
  lines += [f"| {name} | {' | '.join(f'{found[name][m]:.4f}' for m in measures)} |" for name in rows]
  if system in found.get("depth", {}):
    lines += ["", f"({system}: the dual-encoder's {found['depth'][system]} best, ranked again)"]
  return "\n".join(lines)


def _configuration(model: Model, run: Path) -> dict[str, Any]:
  """Of the run; of an imported model what belongs to it."""
  path = run / "config.json"
  return read_json(path) if path.is_file() else {"model": dataclasses.asdict(model.settings)}
