"""Exported models: read back bit for bit; arrays and settings as the tools' own files have them."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_pretrained import edit
from test_retrieval import WORDS

from ernie_jax import checkpoints, config, mesh, pretrained, recipe, step, templates, tokens
from ernie_jax.__main__ import main
from ernie_jax.export import export
from ernie_jax.pretrained import Checkpoint
from ernie_jax.search import Model

FIXTURES = Path(__file__).parent / "fixtures"
TEXTS = ["brown foxes jump", "old birds sing of rain and of [SEP] snow", "lazy"]
SHAPE = config.Architecture(width=16, layers=3, heads=2, inner=32, positions=64, epsilon=1e-6)
DATA = config.Data(query_length=9, passage_length=20)


def made(directory: Path, shape=SHAPE, data=DATA, **settings) -> Path:
  """A run's folder with a model whose every parameter is random, norms and biases too."""
  tokenizer, params, model = random_model(shape, **{"late_width": 8, **settings})
  about = {"student": "cascade", "corpus": "encode", "fingerprint": "f00d", "data": dataclasses.asdict(data)}
  checkpoints.save_model(directory / "model", params, model, about)
  tokenizer.save(directory / "model" / "tokenizer")
  return directory


@functools.cache
def random_model(shape, **settings):
  """Kept, for to make one takes longer than most tests."""
  tokenizer = tokens.Tokenizer.train(WORDS, 120)
  shape = dataclasses.replace(shape, vocabulary=len(tokenizer), special=tokenizer.special)
  model = config.Model(scratch=shape, **settings)
  like = jax.eval_shape(lambda: step.init_params(model, shape, shape, jax.random.key(0)))
  rng = np.random.default_rng(0)
  # About what a trained model has: scales near 1, all else near 0.
  noisy = lambda name, x: np.float32(rng.normal("scale" in name, 0.1, x.shape))
  return tokenizer, jax.tree.map(noisy, step.names(like), like), model


def arrays(module) -> dict[str, np.ndarray]:
  return {} if module is None else {name: np.asarray(x) for name, x in checkpoints.named(module).items()}


def same(found: dict[str, np.ndarray], module) -> None:
  expected = arrays(module)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x, err_msg=name)


TASKS = dataclasses.replace(SHAPE, tasks=3, types=4, activation="relu", dropout=0.2)
DUAL = [
  {},
  {"pooling": "mean", "cosine": True},
  {"dual_width": 5},
  {"dual_width": 5, "cosine": True, "tied": False},
  {"shape": TASKS, "data": dataclasses.replace(DATA, template="rocketqa")},
  {"data": dataclasses.replace(DATA, markers=True)},
]


@pytest.mark.parametrize("settings", DUAL, ids=str)
def test_a_dual_encoder_comes_back_bit_for_bit(tmp_path, settings):
  run = made(tmp_path / "run", **settings)
  export(run, "sentence-transformers", tmp_path / "out")
  student, model = (own := Model.load(run)).params["student"], own.settings
  found = pretrained.load(tmp_path / "out", "")
  same(found.encoder, student.encoder)
  same(found.query_encoder, student.query_encoder)
  same(found.reduction, student.reduction)
  assert found.architecture == dataclasses.replace(student.encoder.architecture, special=())
  for field in ("pooling", "cosine", "dual_width", "tied"):
    assert found.model[field] == getattr(model, field), field
  for field in pretrained.DATA:
    assert found.data[field] == getattr(own.template.data, field), field
  assert found.notes == ()


@pytest.mark.parametrize(
  "settings",
  [{}, {"late_width": None}, {"data": dataclasses.replace(DATA, markers=True, augment=True)}, {"shape": TASKS}],
  ids=str,
)
def test_late_interaction_comes_back_bit_for_bit(tmp_path, settings):
  run = made(tmp_path / "run", **settings)
  export(run, "pylate", tmp_path / "out")
  own = Model.load(run)
  found = pretrained.load(tmp_path / "out", "")
  same(found.encoder, own.params["student"].encoder)
  same(found.projection, own.params["student"].projection)
  assert found.model["late_width"] == own.settings.late_width
  assert found.notes == ()
  for field in ("query_length", "passage_length", "markers", "augment"):
    assert found.data[field] == getattr(own.template.data, field), field


@pytest.mark.parametrize("settings", [{}, {"share_encoder": True}, {"shape": TASKS}], ids=str)
def test_a_cross_encoder_comes_back_bit_for_bit(tmp_path, settings):
  run = made(tmp_path / "run", **settings)
  export(run, "cross-encoder", tmp_path / "out")
  params = Model.load(run).params
  found = pretrained.load(tmp_path / "out", "")
  same(found.encoder, params["teacher"].encoder or params["student"].encoder)
  same(found.pooler, params["teacher"].pooler)
  same(found.head, params["teacher"].head)
  assert found.model["teacher_pooler"]


@pytest.mark.parametrize("settings", [{}, {"tied": False}, {"shape": TASKS}], ids=str)
def test_an_encoder_comes_back_bit_for_bit(tmp_path, settings):
  run = made(tmp_path / "run", **settings)
  export(run, "hf", tmp_path / "out")
  student = Model.load(run).params["student"]
  if student.query_encoder is None:
    same(pretrained.load(tmp_path / "out", "").encoder, student.encoder)
  else:
    same(pretrained.load(tmp_path / "out" / "query", "").encoder, student.query_encoder)
    same(pretrained.load(tmp_path / "out" / "passage", "").encoder, student.encoder)


def test_a_run_comes_back_bit_for_bit(tmp_path):
  run = made(tmp_path / "run", tied=False, dual_width=5, pooling="mean")
  own = Model.load(run)
  student, teacher = (pretrained.load(run, "", teacher=teacher) for teacher in (False, True))
  same(student.encoder, own.params["student"].encoder)
  same(student.query_encoder, own.params["student"].query_encoder)
  same(student.projection, own.params["student"].projection)
  same(student.reduction, own.params["student"].reduction)
  same(teacher.encoder, own.params["teacher"].encoder)
  same(teacher.pooler, own.params["teacher"].pooler)
  same(teacher.head, own.params["teacher"].head)
  assert teacher.projection == teacher.query_encoder == {}
  assert student.model == {name: getattr(own.settings, name) for name in pretrained.MODEL}


@pytest.mark.parametrize("name", ["ernie", "ernie_zh"])
def test_the_files_of_transformers_come_back(tmp_path, name):
  """transformers' own file -> import -> export: the same names and bits, the same configuration."""
  source = shutil.copytree(FIXTURES / name, tmp_path / "source")
  (source / "vocab.txt").write_text("\n".join([*tokens.SPECIAL, *(f"word{i}" for i in range(35))]))
  assert (
    main(["import", str(source), "--output", str(tmp_path / "run"), "--passage-length", "8", "--query-length", "8"])
    == 0
  )
  assert main(["export", str(tmp_path / "run"), "--to", "hf", "--output", str(tmp_path / "out")]) == 0
  theirs, ours = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
  assert ours.keys() == {name for name in theirs if not name.startswith("pooler")}
  for key, x in ours.items():
    np.testing.assert_array_equal(x, theirs[key], err_msg=key)
  before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
  kind = set() if before["use_task_id"] else {"architectures", "model_type"}  # without task embeddings: BERT
  assert {k for k, v in after.items() if k in before and before[k] != v} == kind


@pytest.mark.parametrize("to", ["sentence-transformers", "pylate", "cross-encoder", "hf", "onnx"])
def test_tokens_of_texts_and_pairs_are_ours(tmp_path, to):
  run = made(tmp_path / "run")
  export(run, to, tmp_path / "out")
  import tokenizers

  template = Model.load(run).template
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
  theirs.encode_special_tokens = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())[
    "split_special_tokens"
  ]
  store = tokens.in_memory(TEXTS, template.tokenizer)
  one = theirs.encode(TEXTS[1])
  rows = templates.rows([(store[1],)], len(one.ids), template.tokenizer)
  assert one.ids == rows.tokens[0].tolist()
  pair = theirs.encode(TEXTS[0], TEXTS[1])
  rows = templates.rows([(store[0], store[1])], len(pair.ids), template.tokenizer)
  assert pair.ids == rows.tokens[0].tolist()
  assert pair.type_ids == rows.types[0].tolist()
  assert tokens.digest(tokens.Tokenizer.load(tmp_path / "out")) == tokens.digest(template.tokenizer)


def test_the_card_says_what_was_measured_and_on_what(tmp_path):
  run = made(tmp_path / "run")
  values = {"MRR@10": 0.25, "R@20": 0.5}
  found = {"bm25": values, "dual": {"MRR@10": 0.31416, "R@20": 0.75}, "cross": values, "depth": {"cross": 10}}
  config.write(run / "metrics.json", json.dumps(found))
  config.write(run / "config.json", json.dumps({"seed": 1234567}))
  export(run, "sentence-transformers", tmp_path / "dual")
  card = (tmp_path / "dual" / "README.md").read_text()
  assert "| dual | 0.3142 | 0.7500 |" in card
  assert "`f00d`" in card
  assert "1234567" in card
  assert 'SentenceTransformer("dual")' in card
  assert len(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].strip().splitlines()) == 3
  export(run, "cross-encoder", tmp_path / "cross")
  assert "the dual-encoder's 10 best" in (tmp_path / "cross" / "README.md").read_text()


@pytest.mark.parametrize(
  ("to", "settings", "says"),
  [
    ("sentence-transformers", {"data": dataclasses.replace(DATA, markers=True, template="rocketqa")}, "its prompts"),
    ("cross-encoder", {"teacher_pooler": False}, "model.teacher_pooler"),
    ("pylate", {"tied": False}, "one encoder"),
  ],
)
def test_what_a_layout_cannot_hold_is_one_line_and_leaves_nothing(tmp_path, capsys, to, settings, says):
  run = made(tmp_path / "run", **settings)
  assert main(["export", str(run), "--to", to, "--output", str(tmp_path / "out")]) == 2
  said = capsys.readouterr().err
  assert says in said
  assert said.count("\n") == 1
  assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_nothing_is_overwritten(tmp_path, capsys):
  run = made(tmp_path / "run")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine.txt").write_text("mine")
  assert main(["export", str(run), "--to", "hf", "--output", str(tmp_path / "out")]) == 2
  assert "name a new folder" in capsys.readouterr().err
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
  assert main(["import", str(run), "--output", str(tmp_path / "out")]) == 2
  assert "name a new folder" in capsys.readouterr().err


def test_a_model_without_a_cross_encoder_exports_none(tmp_path, capsys):
  run = made(tmp_path / "run")
  export(run, "sentence-transformers", tmp_path / "dual")
  assert main(["import", str(tmp_path / "dual"), "--output", str(tmp_path / "again")]) == 0
  assert "random, for no checkpoint brings it: teacher.head" in capsys.readouterr().out
  assert main(["export", str(tmp_path / "again"), "--to", "cross-encoder", "--output", str(tmp_path / "x")]) == 2
  assert "no trained cross-encoder" in capsys.readouterr().err


def test_training_starts_from_a_run_and_from_some_of_its_layers(tmp_path, capsys):
  """The student's parameters from its student, the cross-encoder's from its cross-encoder; what is left is named."""
  run = made(tmp_path / "run")
  rows = [{"id": f"p{i}", "text": f"{WORDS[i % len(WORDS)]} {i}"} for i in range(40)]
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for split in ("train", "dev", "test"):
    queries = [{"id": f"{split}{i}", "text": f"{split} {i}", "positives": [f"p{i}"]} for i in range(3)]
    (tmp_path / "in" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
  data = dataclasses.replace(DATA, name="jsonl", folder=str(tmp_path / "in"), cache=str(tmp_path / "cache"))
  model = config.Model(start=str(run), start_layers=(0, 2), late_width=4, scan=False, pooling="mean")
  settings = config.Config(data=data, model=model)
  with jax.set_mesh(mesh.make()):
    params = recipe.prepare(tmp_path / "new", settings).params
  before = Model.load(run).params
  for name, x in arrays(before["student"].encoder).items():
    expected = x[[0, 2]] if name.startswith("layers.") else x
    np.testing.assert_array_equal(arrays(params["student"].encoder)[name], expected)
  same(arrays(params["teacher"]), before["teacher"])
  said = capsys.readouterr().err
  assert "random at the start, for no checkpoint brings it: student.projection\n" in said
  assert "was made with model.pooling=cls, this run has mean\n" in said
  with jax.set_mesh(mesh.make()), pytest.raises(config.UserError, match=r"model.start_layers=\(0, 3\).*layers 0 to 2"):
    recipe.prepare(
      tmp_path / "other", dataclasses.replace(settings, model=dataclasses.replace(model, start_layers=(0, 3)))
    )


def test_a_model_without_a_cross_encoder_searches_without(tmp_path, capsys):
  export(made(tmp_path / "run"), "sentence-transformers", tmp_path / "dual")
  assert main(["import", str(tmp_path / "dual"), "--output", str(tmp_path / "again"), "--layers", "0"]) == 0
  (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"id": w, "text": w}) + "\n" for w in WORDS[:5]))
  data = ["jsonl", "--from", str(tmp_path)]
  assert main(["encode", str(tmp_path / "again"), *data, "--output", str(tmp_path / "encoded")]) == 0
  assert main(["search", str(tmp_path / "encoded"), WORDS[1], "--k", "2"]) == 0
  capsys.readouterr()
  assert main(["search", str(tmp_path / "encoded"), WORDS[1], "--with", "cross"]) == 2
  assert "no cross-encoder; import one" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  place = tmp_path_factory.mktemp("exported")
  run = made(place / "run", dual_width=5, cosine=True, tied=False)
  export(run, "sentence-transformers", place / "dual")
  export(made(place / "late"), "pylate", place / "colbert")
  return place


def changed(path: Path, **fields) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
  ("layout", "spoil", "says"),
  [
    ("dual", lambda d: (d / "router_config.json").unlink(), "router_config.json: missing"),
    ("dual", lambda d: (d / "modules.json").write_text("[]"), "not what sentence-transformers writes"),
    ("dual", lambda d: (d / "modules.json").write_text('[{"type": "a.B", "path": "../x"}]'), "outside of it, '../x'"),
    ("colbert", lambda d: shard(d, []), "holds no settings"),
    ("colbert", lambda d: shard(d, {"weight_map": ["a"]}), "names no files beside it"),
    ("colbert", lambda d: shard(d, {"weight_map": {"a": "../b"}}), "names no files beside it"),
    ("dual", lambda d: (d / "modules.json").write_text('[{"type": "a.LSTM", "path": ""}]'), "begins with LSTM"),
    ("dual", lambda d: changed(d / "query_1_Pooling" / "config.json", pooling_mode="max"), "pooling max"),
    (
      "dual",
      lambda d: changed(d / "query_2_Dense" / "config.json", activation_function="torch.nn.Tanh"),
      "an activation or a residual",
    ),
    ("dual", lambda d: edit(d / "query_2_Dense", lambda t: t.pop("linear.weight")), "linear.weight \\(missing\\)"),
    ("dual", lambda d: edit(d / "query_2_Dense", lambda t: t.update(widen(t))), "linear.weight .*instead of"),
    ("dual", lambda d: edit(d / "query_2_Dense", lambda t: t.update(other(t))), "a Dense each"),
    ("dual", lambda d: edit(d / "query_0_Transformer", lambda t: t.update(more=np.ones(2))), "more \\(unknown\\)"),
    ("colbert", lambda d: edit(d / "1_Dense", lambda t: t.update({"linear.bias": np.ones(8)})), "has a bias"),
  ],
)
def test_what_cannot_be_read_is_one_line(exported, tmp_path, layout, spoil, says):
  place = shutil.copytree(exported / layout, tmp_path / layout)
  spoil(place)
  with pytest.raises(config.UserError, match=says) as error:
    pretrained.load(place, "")
  assert "\n" not in str(error.value)


def shard(folder, index):
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def widen(tensors):
  return {"linear.weight": np.ones((5, 17), np.float32)}


def other(tensors):
  return {"linear.weight": tensors["linear.weight"] + 1}


def test_prefixes_that_are_not_ours_are_noted(exported, tmp_path):
  place = shutil.copytree(exported / "colbert", tmp_path / "colbert")
  changed(
    place / "config_sentence_transformers.json", query_prefix="[Q] ", document_prefix="[D] ", skiplist_words=["!"]
  )
  first, second = pretrained.load(place, "").notes
  assert "'[Q] ' and '[D] '" in first
  assert "punctuation" in second


def test_a_marker_is_found_in_a_text_and_special_tokens_are_not(tmp_path):
  import transformers

  run = made(tmp_path / "run", data=dataclasses.replace(DATA, markers=True))
  export(run, "sentence-transformers", tmp_path / "out")
  template = Model.load(run).template
  text = "old [SEP] birds [unused1]"
  found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(f"[unused0] {text}")["input_ids"]
  own = template.tokenizer.encode([text.replace(" [unused1]", "")])[0]
  assert found[:-2] == template.queries([own], len(own) + 3).tokens[0].tolist()[:-1]
  assert found[-2] == template.markers[1]  # a marker in a text is one there: training splits it


def test_a_dense_layer_without_bias_has_one_of_zeros(tmp_path, capsys):
  export(made(tmp_path / "run", dual_width=5), "sentence-transformers", tmp_path / "dual")
  edit(tmp_path / "dual" / "2_Dense", lambda t: t.pop("linear.bias"))
  assert main(["import", str(tmp_path / "dual"), "--output", str(tmp_path / "again")]) == 0
  assert "student.reduction" not in capsys.readouterr().out
  found = pretrained.load(tmp_path / "again", "").reduction
  np.testing.assert_array_equal(found["kernel"], pretrained.load(tmp_path / "dual", "").reduction["kernel"])
  assert not found["bias"].any()


def test_a_length_of_all_positions_leaves_room_for_a_query(tmp_path):
  export(made(tmp_path / "run"), "sentence-transformers", tmp_path / "dual")
  settings = tmp_path / "dual" / "config.json"
  settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "ernie_jax"}))
  changed(tmp_path / "dual" / "sentence_bert_config.json", max_seq_length=64)  # as many as positions
  assert main(["import", str(tmp_path / "dual"), "--output", str(tmp_path / "again")]) == 0
  data = Model.load(tmp_path / "again").template.data
  assert (data.query_length, data.passage_length, data.pair_length) == (32, 33, 64)


def test_an_imported_model_has_no_corpus_and_no_judge(tmp_path, capsys):
  """One line each, and nothing of a random cross-encoder."""
  export(made(tmp_path / "run"), "sentence-transformers", tmp_path / "dual")
  assert main(["import", str(tmp_path / "dual"), "--output", str(tmp_path / "again")]) == 0
  for verb in ("search", "evaluate", "mine", "serve"):
    assert main([verb, str(tmp_path / "again"), *["x"] * (verb == "search")]) == 2
    assert "an imported model without a corpus; `ernie-jax encode" in capsys.readouterr().err
  (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"id": w, "text": w}) + "\n" for w in WORDS[:5]))
  assert (
    main(["encode", str(tmp_path / "again"), "jsonl", "--from", str(tmp_path), "--output", str(tmp_path / "e")]) == 0
  )
  capsys.readouterr()
  assert main(["mine", str(tmp_path / "e"), "--output", str(tmp_path / "n.trec")]) == 2
  assert "no cross-encoder to judge with; add --margin None" in capsys.readouterr().err
  assert not (tmp_path / "n.trec").exists()


def test_a_run_is_imported_with_its_cross_encoder(tmp_path):
  run = made(tmp_path / "run")
  assert main(["import", str(run), "--output", str(tmp_path / "again")]) == 0
  before, after = Model.load(run).params, Model.load(tmp_path / "again").params
  for name in ("student", "teacher"):
    same(arrays(after[name]), before[name])


def test_colbert_s_own_settings(tmp_path):
  run = made(tmp_path / "run", data=dataclasses.replace(DATA, markers=True))
  export(run, "hf", tmp_path / "colbert")
  settings = json.loads((tmp_path / "colbert" / "config.json").read_text())
  del settings["ernie_jax"]
  (tmp_path / "colbert" / "config.json").write_text(json.dumps(settings | {"architectures": ["HF_ColBERT"]}))
  kernel = np.ones((8, 16), np.float32)
  edit(tmp_path / "colbert", lambda t: t.update({"linear.weight": kernel}))
  about = {"query_maxlen": 11, "doc_maxlen": 22, "mask_punctuation": True, "attend_to_mask_tokens": False}
  (tmp_path / "colbert" / "artifact.metadata").write_text(json.dumps(about))
  found = pretrained.load(tmp_path / "colbert", "")
  np.testing.assert_array_equal(found.projection["kernel"], kernel.T)
  assert found.data == {"query_length": 11, "passage_length": 22, "markers": True, "augment": True}
  assert found.notes == (pretrained.PUNCTUATION,)
  edit(tmp_path / "colbert", lambda t: t.update({"linear.bias": np.ones(8, np.float32)}))
  with pytest.raises(config.UserError, match=r"linear\.bias \(a projection has none\)"):
    pretrained.load(tmp_path / "colbert", "")


def test_epsilon_decides_a_vector():
  digest = lambda epsilon: Checkpoint(dataclasses.replace(SHAPE, epsilon=epsilon), {}, Path(), "").digest()
  assert digest(1e-5) != digest(1e-12)
