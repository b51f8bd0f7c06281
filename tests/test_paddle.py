"""Models in PaddleNLP's and RocketQA's files: what is read scores as the documented model does, in float64."""

import contextlib
import dataclasses
import functools
import io
import json

import jax
import numpy as np
import pytest
import released
from released import ERNIE_1_BASE, ERNIE_2_BASE, ERNIE_2_LARGE, ERNIE_3_BASE

from ernie_jax import config, hub, pretrained, scores, search
from ernie_jax.__main__ import main
from ernie_jax.config import UserError

ENGLISH = "a quick brown fox jumps over the lazy dog rivers mountains rain sun old young birds"
WORDS = [*released.SPECIAL, *ENGLISH.split()]
SIGNS = [*released.SPECIAL, *"天地玄黄宇宙洪荒日月盈昃辰宿列张"]
BASE = ERNIE_2_BASE.small(len(WORDS), 16, 2)
LARGE = ERNIE_2_LARGE.small(len(WORDS), 24, 3)
CHINESE = dataclasses.replace(ERNIE_3_BASE.small(len(SIGNS), 16, 2), inner=40)
FIRST = ERNIE_1_BASE.small(len(SIGNS), 16, 2)
QUERIES = ["quick brown fox", "old birds", "rain over the mountains"]
PASSAGES = [("lazy dog", "a quick fox jumps over the lazy dog"), ("", "young birds"), ("sun", "rivers rain mountains")]


def said(vocabulary: list[str], text: str) -> str:
  """English, or the same with other signs for its words."""
  return text if vocabulary is WORDS else " ".join(vocabulary[WORDS.index(word)] for word in text.split())


@functools.partial(jax.jit, static_argnames=("model", "query"))
def embed(student, rows, model, query):
  return scores.embed(student, model, rows, None, query, late=False).vector


@jax.jit
def cross(params, rows):
  return scores.cross(params, rows, None, leads=True)[0]


def read(folder, *, teacher=False):
  return pretrained.load(*hub.locate(str(folder), folder), teacher=teacher)


def adopted(student, other, output):
  """The model that `ernie-jax import` makes of a checkpoint, and of another's cross-encoder."""
  pooler = {"teacher_pooler": (other or student).model["teacher_pooler"]}
  model = config.Model(share_encoder=other is None, **student.model | pooler)
  pretrained.adopt(student, other, model, config.Data(**student.data), output)
  return search.Model.load(output)


def vectors(model, vocabulary):
  """Of the queries, and of the passages."""
  t = model.template
  q = t.queries([t.query(x) for x in t.tokenizer.encode([said(vocabulary, own) for own in QUERIES])], 16)
  p = t.passages([t.passage(x) for x in stored(t, vocabulary)], 24)
  return tuple(np.asarray(embed(model.params["student"], r, model.settings, q is r)) for r in (q, p))


def stored(t, vocabulary):
  """Passages as `tokens.store` has them."""
  parts = [t.tokenizer.encode([said(vocabulary, part) for part in own]) for own in PASSAGES]
  if t.data.template == "bert":
    return [text for _, text in parts]
  return [np.concatenate([title, [t.tokenizer.sep], text]) for title, text in parts]


def expected_vectors(vocabulary, shape, queries, passages, *, titles=True, **more):
  """The same by the documented model."""
  q = [released.query(vocabulary, said(vocabulary, own)) for own in QUERIES]
  p = [
    released.passage(vocabulary, said(vocabulary, title), said(vocabulary, text))
    if titles
    else released.query(vocabulary, said(vocabulary, text))
    for title, text in PASSAGES
  ]
  return released.dual(queries, shape, q, **more), released.dual(passages, shape, p, **more)


def logits(model, vocabulary):
  """Of every query with every passage [3, 3]."""
  t = model.template
  q = [t.query(x) for x in t.tokenizer.encode([said(vocabulary, own) for own in QUERIES]) for _ in PASSAGES]
  p = [t.passage(x) for _ in QUERIES for x in stored(t, vocabulary)]
  return np.asarray(cross(model.params, t.pairs(q, p, 40))).reshape(3, 3)


def expected_logits(vocabulary, shape, weights, *, pooler, **more):
  """[3, 3, classes]"""
  own = functools.partial(said, vocabulary)
  pairs = [released.pair(vocabulary, own(q), own(title), own(text)) for q in QUERIES for title, text in PASSAGES]
  return released.cross(weights, shape, pairs, pooler=pooler, **more).reshape(3, 3, -1)


def close(found, expected):
  """float32 beside float64, on values of order 1."""
  assert 0.3 < np.abs(expected).max() < 30
  np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


ATOL = 1e-5  # seen: 1.2e-6, on values up to 4.4


# ---- Forms ---------------------------------------------------------------------------------------------------------


def prefixed(weights, prefix="ernie."):
  """As a model with heads has them: the encoder and its pooler below, heads beside them."""
  inside = ("embeddings.", "encoder.", "pooler.")
  return {prefix + name if name.startswith(inside) else name: x for name, x in weights.items()}


@functools.cache
def weights(shape, seed=0):
  return released.encoder(shape, seed)


def reduced(shape, width=10):
  return released.linear("emb_reduce_linear", shape.width, width, 7)


def classifier(shape, classes, seed=8):
  return released.linear("classifier", shape.width, classes, seed)


SEARCH = "ernie-search-base-dual-encoder-marco-en"
FORMS = {
  "prefixed": lambda: prefixed(weights(BASE) | classifier(BASE, 2)),
  "unprefixed": lambda: weights(BASE),
  "reduced": lambda: prefixed(weights(BASE) | classifier(BASE, 2) | reduced(BASE)),
  "pre-training's leftovers": lambda: prefixed(weights(BASE) | released.masked_language_model(BASE)),
  "without a pooler": lambda: {name: x for name, x in weights(BASE).items() if "pooler" not in name},
  "query tower alone": lambda: towers(query=weights(BASE)),
  "written twice": lambda: towers(query=weights(BASE) | reduced(BASE), title=weights(BASE) | reduced(BASE)),
}


def towers(**models):
  """As PaddleNLP's ErnieDualEncoder has them: encoders with a classifier of their own that nothing reads."""
  return {
    f"{which}_ernie.{name}": x
    for seed, (which, own) in enumerate(models.items())
    for name, x in prefixed(own | classifier(BASE, 2, seed)).items()
  }


def agree(model, vocabulary, shape, queries, passages=None, **more):
  """Vectors and inner products beside the documented model's."""
  expected = expected_vectors(vocabulary, shape, queries, queries if passages is None else passages, **more)
  found = vectors(model, vocabulary)
  for one, reference in zip(found, expected):
    close(one, reference)
  np.testing.assert_allclose(found[0] @ found[1].T, expected[0] @ expected[1].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("form", "old"), [*((form, False) for form in FORMS), ("prefixed", True), ("reduced", True)])
def test_ernie_search_dual_encoder(form, old, tmp_path):
  arrays = FORMS[form]()
  found = read(released.paddlenlp(tmp_path / SEARCH, arrays, released.settings(BASE), WORDS, old=old))
  assert found.notes[0].startswith("LayerNorm's epsilon is 1e-05, as in RocketQA's and ERNIE-Search's models (")
  assert found.model["tied"]
  assert found.head == {}
  reduction = reduced(BASE) if any("reduce" in name for name in arrays) else {}
  model = adopted(found, None, tmp_path / "model")
  agree(model, WORDS, BASE, weights(BASE) | reduction)
  assert not model.crosses


def test_two_towers(tmp_path):
  query, title = weights(BASE), weights(BASE, 1)
  arrays = towers(query=query, title=title)
  found = read(released.paddlenlp(tmp_path / "rocketqa-v1-marco", arrays, released.settings(BASE), WORDS))
  assert not found.model["tied"]
  agree(adopted(found, None, tmp_path / "model"), WORDS, BASE, query, title)


@pytest.mark.parametrize("prefix", ["ernie.", "ernie.ernie.", ""])
def test_ernie_search_cross_encoder(prefix, tmp_path):
  own = weights(LARGE) | classifier(LARGE, 1)
  arrays = prefixed(own, prefix)
  if prefix == "ernie.ernie.":  # the state of PaddleNLP's ErnieCrossEncoder
    arrays = {name.replace("classifier", "ernie.classifier"): x for name, x in arrays.items()}
  place = tmp_path / "ernie-search-large-cross-encoder-marco-en"
  other = read(released.paddlenlp(place, arrays, released.settings(LARGE), WORDS), teacher=True)
  student = read(released.paddlenlp(tmp_path / SEARCH, weights(BASE), released.settings(BASE), WORDS))
  assert other.notes == ("LayerNorm's epsilon is 1e-05, as in RocketQA's and ERNIE-Search's models (a ranking head)",)
  model = adopted(student, other, tmp_path / "model")
  close(logits(model, WORDS), expected_logits(WORDS, LARGE, own, pooler=True)[..., 0])
  assert model.crosses


def test_rocketqa_v2s_cross_encoder_reads_no_pooler_if_there_is_one(tmp_path):
  own = weights(BASE) | classifier(BASE, 1)
  place = tmp_path / "rocketqav2-en-marco-cross-encoder"
  other = read(released.paddlenlp(place, prefixed(own), released.settings(BASE), WORDS), teacher=True)
  assert any("its pooler is left out" in note for note in other.notes)
  model = adopted(other, other, tmp_path / "model")
  close(logits(model, WORDS), expected_logits(WORDS, BASE, own, pooler=False)[..., 0])


def test_ernie_3_keeps_the_epsilon_of_its_configuration(tmp_path):
  own = weights(CHINESE)
  found = read(released.paddlenlp(tmp_path / "ernie-3.0-base-zh", prefixed(own), released.settings(CHINESE), SIGNS))
  a = found.architecture
  assert (a.tasks, a.positions, a.types, a.inner, a.epsilon) == (3, 2048, 4, 40, 1e-12)
  assert found.notes == ()
  agree(adopted(found, None, tmp_path / "model"), SIGNS, CHINESE, own, titles=False, epsilon=1e-12)


@pytest.mark.parametrize("old", [False, True])
def test_ernie_1_and_a_vocabulary_of_numbered_lines(old, tmp_path):
  own = prefixed(weights(FIRST) | released.masked_language_model(FIRST))
  folder = released.paddlenlp(tmp_path / "ernie-1.0", own, released.settings(FIRST), SIGNS, old=old, numbered=True)
  names = {"init_class": "ErnieTokenizer"} if old else {"tokenizer_class": "ErnieTokenizer"}
  (folder / "tokenizer_config.json").write_text(json.dumps(names | {"do_lower_case": True}))  # PaddleNLP saves one
  found = read(folder)
  a = found.architecture
  assert (a.activation, a.tasks, a.positions, a.types, a.epsilon) == ("relu", 0, 513, 2, 1e-12)
  agree(adopted(found, None, tmp_path / "model"), SIGNS, FIRST, weights(FIRST), titles=False, epsilon=1e-12)


# ---- RocketQA ------------------------------------------------------------------------------------------------------

LENGTHS = {"q_max_seq_len": 16, "p_max_seq_len": 24}


@pytest.mark.parametrize("shape", [BASE, FIRST])
@pytest.mark.parametrize("shared", [False, True])
def test_rocketqa_dual_encoder(shape, shared, tmp_path):
  vocabulary = SIGNS if shape is FIRST else WORDS
  query, passage = ({name: x for name, x in weights(shape, seed).items() if "pooler" not in name} for seed in (0, 1))
  variables = released.static(passage, "titlepara_") | ({} if shared else released.static(query, "query_"))
  about = {"model_type": "dual_encoder", "share_parameter": int(shared)} | LENGTHS
  found = read(released.rocketqa(tmp_path / "de", variables, shape, vocabulary, **about))
  assert found.model["tied"] == shared
  assert "(one file for each variable)" in found.notes[0]
  assert [note for note in found.notes if "for_cn" in note] == list(found.notes[1:])
  assert len(found.notes) == (2 if shape is FIRST else 1)
  assert found.data == {"template": "rocketqa", "query_length": 16, "passage_length": 24}
  agree(adopted(found, None, tmp_path / "model"), vocabulary, shape, passage if shared else query, passage)


def test_shared_parameters_are_the_passages_even_where_queries_left_some(tmp_path):
  variables = released.static(weights(BASE, 1), "titlepara_") | released.static(weights(BASE), "query_")
  found = read(released.rocketqa(tmp_path / "de", variables, BASE, WORDS, share_parameter=1, **LENGTHS))
  assert found.query_encoder == {}
  agree(adopted(found, None, tmp_path / "model"), WORDS, BASE, weights(BASE, 1))


def test_rocketqa_cross_encoder_ranks_by_the_difference_of_its_classes(tmp_path):
  own = weights(FIRST) | classifier(FIRST, 2)
  about = {"model_type": "cross_encoder", "max_seq_len": 40}
  folder = released.rocketqa(tmp_path / "ce", released.static(own, ""), FIRST, SIGNS, **about)
  found = read(folder, teacher=True)
  assert "its two classes are one logit here, their difference: the same ranking" in found.notes
  model = adopted(found, found, tmp_path / "model")
  classes = expected_logits(SIGNS, FIRST, own, pooler=True)
  difference = classes[..., 1] - classes[..., 0]
  close(logits(model, SIGNS), difference)
  probability = np.exp(classes) / np.exp(classes).sum(-1, keepdims=True)
  np.testing.assert_allclose(1 / (1 + np.exp(-difference)), probability[..., 1], rtol=1e-12)


def test_rocketqa_v2_holds_all_three(tmp_path):
  query, passage, both = (weights(BASE, seed) for seed in range(3))
  pooled = {name: x for name, x in both.items() if "pooler" in name}  # left by the model that it began with
  both = both | classifier(BASE, 1)
  variables = released.static({name: x for name, x in both.items() if name not in pooled}, "qtp_")
  for prefix, own in (("query_", query), ("titlepara_", passage)):
    variables |= released.static({name: x for name, x in own.items() if name not in pooled}, prefix)
  folder = released.rocketqa(tmp_path / "joint", variables | released.static(pooled, ""), BASE, WORDS, **LENGTHS)
  student, other = read(folder), read(folder, teacher=True)
  assert other.pooler == {}
  model = adopted(student, other, tmp_path / "model")
  agree(model, WORDS, BASE, query, passage)
  close(logits(model, WORDS), expected_logits(WORDS, BASE, both, pooler=False)[..., 0])
  assert model.crosses


# ---- What a comparison would notice --------------------------------------------------------------------------------


def tanh_gelu(x):
  return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def without(name):
  return lambda own: own | {name: np.zeros_like(own[name])}


@pytest.mark.parametrize(
  ("shape", "change", "more"),
  [
    (BASE, dict, {"epsilon": 1e-12}),
    (BASE, dict, {"epsilon": 2e-5}),
    (BASE, without("embeddings.token_type_embeddings.weight"), {}),
    (CHINESE, without("embeddings.task_type_embeddings.weight"), {}),
    (BASE, lambda own: own | {"encoder.layers.0.linear1.weight": own["encoder.layers.0.linear1.weight"][:, ::-1]}, {}),
    (BASE, lambda own: own | {"encoder.layers.1.norm2.weight": own["encoder.layers.1.norm1.weight"]}, {}),
  ],
)
def test_the_reference_tells_models_apart(shape, change, more):
  own, text = weights(shape), [released.passage(WORDS, "lazy dog", "a quick fox")]
  difference = released.dual(change(own), shape, text, **more) - released.dual(own, shape, text)
  assert np.abs(difference).max() > 100 * ATOL


def test_the_reference_tells_activations_apart(monkeypatch):
  own, text = weights(BASE), [released.passage(WORDS, "lazy dog", "a quick fox")]
  exact = released.dual(own, BASE, text)
  relu = released.dual(own, dataclasses.replace(BASE, activation="relu"), text)
  monkeypatch.setattr(released, "gelu", tanh_gelu)
  for other in (relu, released.dual(own, BASE, text)):
    assert np.abs(other - exact).max() > 10 * ATOL


def test_padding_changes_nothing_in_the_reference():
  own = weights(BASE)
  texts = [released.query(WORDS, text) for text in QUERIES]
  alone = [released.dual(own, BASE, [text])[0] for text in texts]
  np.testing.assert_allclose(released.dual(own, BASE, texts), alone, rtol=0, atol=1e-12)


# ---- Checkpoints that do not fit -----------------------------------------------------------------------------------

LAYERED = "ernie.encoder.layers.1.self_attn.q_proj.weight"


def spoiled(**more):
  """(folder) -> the dual-encoder's with other arrays, or without those that are None."""
  arrays = prefixed(weights(BASE) | classifier(BASE, 2)) | more
  return {name: x for name, x in arrays.items() if x is not None}


def ones(*shape, dtype=np.float32):
  return np.ones(shape, dtype)


REDUCE, WORD = "emb_reduce_linear", "ernie.embeddings.word_embeddings.weight"
NORM = "embeddings.layer_norm.bias"
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
  ("arrays", "says"),
  [
    ({LAYERED: None}, [f"1 tensors do not fit config.json: {QUERY} (missing)"]),
    ({LAYERED: ones(16, 3)}, [f"{QUERY} ((16, 3) instead of (16, 16))"]),
    ({LAYERED: ones()}, [f"{QUERY} (() instead of (16, 16))"]),
    ({LAYERED: ones(16, 16, dtype=np.int8)}, [f"{QUERY} (int8 instead of float32)"]),
    ({LAYERED: ones(16, 16, dtype=bool)}, [f"{QUERY} (bool instead of float32)"]),
    ({"ernie.encoder.layers.2.norm1.bias": ones(16)}, ["encoder.layer.2.attention.output.LayerNorm.bias (unknown)"]),
    ({"ernie.adapter.weight": ones(2)}, ["adapter.weight (unknown)"]),
    ({NORM: ones(16)}, [f"{NORM} is there twice"]),
    (
      {LAYERED: None, f"ernie.{NORM}": ones(3)},
      ["2 tensors", "query.weight (missing)", "embeddings.LayerNorm.bias ((3,) instead of (16,))"],
    ),
    ({WORD: ones(9, 16)}, ["embeddings.word_embeddings.weight ((9, 16) instead of (21, 16))"]),
    ({WORD.replace("word", "task_type"): ones()}, ["task_type_embeddings.weight (() instead of (1, 16))"]),
    ({"ernie.pooler.dense.weight": ones(16, 3)}, ["pooler.dense.weight ((3, 16) instead of (16, 16))"]),
    ({"ernie.pooler.dense.bias": None}, ["pooler.dense.bias (missing)"]),
    ({"ernie.pooler.dense.weight": None}, ["pooler.dense.weight (missing)"]),
    ({f"{REDUCE}.weight": ones(3, 8)}, [f"{REDUCE}.weight ((8, 3) instead of (8, 16))"]),
    ({f"{REDUCE}.weight": ones()}, [f"{REDUCE}.weight (() instead of (1, 16))"]),
    ({f"{REDUCE}.weight": ones(16, 8, dtype=np.int64)}, [f"{REDUCE}.weight (int64 instead of float32)"]),
    ({f"{REDUCE}.weight": ones(16, 8), f"{REDUCE}.bias": ones(7)}, [f"{REDUCE}.bias ((7,) instead of (8,))"]),
    ({f"query_ernie.{REDUCE}.weight": ones(16, 8)}, [f"queries and passages have an {REDUCE} each"]),
    ({"classifier.weight": ones(16, 1)}, ["classifier.bias ((2,) instead of (1,))"]),
    ({"classifier.weight": None}, ["classifier.weight (missing)"]),
    ({f"query_ernie.ernie.{NORM}": ones(16)}, ["query encoder's embeddings.word_embeddings.weight (missing)"]),
  ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(arrays, says, tmp_path):
  folder = released.paddlenlp(tmp_path / SEARCH, spoiled(**arrays), released.settings(BASE), WORDS)
  with pytest.raises(UserError) as error:
    read(folder)
  for words in [*says, "model_state.pdparams"]:
    assert words in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"hidden_size": "16"}, "hidden_size='16' is no number"),
    ({"hidden_size": 16.5}, "hidden_size=16.5 is no number"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True is no number"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1 is no number"),
    ({"num_hidden_layers": 3}, "16 tensors do not fit"),
    ({"num_hidden_layers": 1}, "16 tensors do not fit"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 is no number"),
    ({"num_attention_heads": 3}, "must divide width=16"),
    ({"intermediate_size": 63}, "instead of (63, 16)"),
    ({"max_position_embeddings": 511}, "position_embeddings.weight ((512, 16) instead of (511, 16))"),
    ({"type_vocab_size": 2}, "token_type_embeddings.weight ((4, 16) instead of (2, 16))"),
    ({"vocab_size": 10**9}, "instead of (1000000000, 16)"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000 is no number"),
    ({"hidden_act": "swish"}, "hidden_act 'swish'; gelu or relu is needed"),
    ({"hidden_act": ["gelu"]}, "hidden_act ['gelu']"),
    ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob='0.1' is no number"),
    ({"attention_probs_dropout_prob": 1}, "attention_probs_dropout_prob=1 is no number"),
    ("[]", "holds no settings"),
    ("3", "holds no settings"),
    ("[" * 100_000, "not valid JSON"),
    ("\ud800", "not valid JSON"),
    ('{"init_args": [3]}', "lacks 'vocab_size'"),
    ('{"init_args": [{"init_args": {}}]}', "lacks 'vocab_size'"),
  ],
)  # fmt: skip
def test_a_configuration_that_is_none_is_one_line(change, says, tmp_path):
  folder = released.paddlenlp(tmp_path / SEARCH, weights(BASE), released.settings(BASE), WORDS)
  content = change
  if isinstance(change, dict):
    content = json.dumps({name: x for name, x in (released.settings(BASE) | change).items() if x is not None})
  (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
  with pytest.raises(UserError) as error:
    read(folder)
  assert says in str(error.value)
  assert "config.json" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"model_vocab_path": None}, "config.json: lacks 'model_vocab_path'"),
    ({"model_vocab_path": 3}, "config.json: a path that is none"),
    ({"model_conf_path": "nowhere.json"}, "nowhere.json: missing"),
    ({"model_checkpoint_path": "nowhere"}, "nowhere: cannot be read"),
    ({"model_checkpoint_path": "vocab.txt"}, "vocab.txt: cannot be read"),
    ({"q_max_seq_len": "32"}, "config.json: q_max_seq_len='32' is no number"),
    ("titlepara_pos_embedding", "step_36000: 1 tensors do not fit ernie_config.json: embeddings.position_embeddings"),
    ("query_pre_encoder_layer_norm_scale", "query encoder's embeddings.LayerNorm.weight (missing)"),
    ("titlepara_word_embedding", "holds no encoder: word_embedding is missing"),
  ],
)
def test_a_rocketqa_folder_that_lacks_something_is_one_line(change, says, tmp_path):
  variables = released.static(weights(BASE), "titlepara_") | released.static(weights(BASE), "query_")
  folder = released.rocketqa(tmp_path / "de", variables, BASE, WORDS)
  if isinstance(change, dict):
    about = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({name: x for name, x in about.items() if x is not None}))
  else:
    (folder / "step_36000" / change).unlink()
  with pytest.raises(UserError) as error:
    read(folder)
  assert says in str(error.value)
  assert "\n" not in str(error.value)


def test_a_cross_encoder_starts_from_a_dual_encoders_folder(tmp_path):
  folder = released.rocketqa(tmp_path / "de", released.static(weights(BASE), "titlepara_"), BASE, WORDS)
  student, teacher = (read(folder, teacher=teacher) for teacher in (False, True))
  assert student.digest() == teacher.digest()
  assert not student.pair
  assert teacher.head == {}


# ---- The command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Folders: de/ and ce/ (released), in/ (20 passages), imported/ and encoded/ by the verbs; and what import said."""
  place = tmp_path_factory.mktemp("released")
  dual, both = weights(BASE) | classifier(BASE, 2), weights(LARGE) | classifier(LARGE, 1)
  released.paddlenlp(place / SEARCH, prefixed(dual | reduced(BASE)), released.settings(BASE), WORDS)
  released.paddlenlp(place / "ce", prefixed(both), released.settings(LARGE), WORDS, old=True)
  released.paddlenlp(place / "more", weights(BASE), released.settings(BASE), [*WORDS, "more"])
  rng = np.random.default_rng(0)
  text = lambda least, most: " ".join(rng.choice(ENGLISH.split(), rng.integers(least, most)))
  corpus = [{"id": f"p{i}", "title": text(1, 3) if i % 3 else "", "text": text(4, 12)} for i in range(20)]
  (place / "in").mkdir()
  (place / "in" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
  for split in ("train", "dev", "test"):
    rows = [{"id": f"{split}{i}", "text": text(2, 5), "positives": [f"p{i}"]} for i in range(2)]
    (place / "in" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    command = ["import", str(place / SEARCH), "--output", str(place / "imported"), "--cache", str(place / "cache")]
    assert main([*command, "--cross", str(place / "ce"), "--query-length", "16", "--passage-length", "24"]) == 0
  (place / "said").write_text(printed.getvalue())
  command = ["encode", str(place / "imported"), "jsonl", "--from", str(place / "in"), "--late", "16"]
  assert main([*command, "--output", str(place / "encoded")]) == 0
  return place


def texts(place):
  rows = [json.loads(line) for line in (place / "in" / "corpus.jsonl").read_text().splitlines()]
  return [(row["title"], row["text"]) for row in rows]


def test_import_says_what_it_found_and_assumed(place):
  said = (place / "said").read_text()
  assert f"directory {place / SEARCH}: 2 layers, width 16, vocabulary 21, epsilon 1e-05" in said
  assert f"directory {place / 'ce'}: 3 layers, width 24, vocabulary 21, epsilon 1e-05" in said
  assert "models (emb_reduce_linear)" in said
  assert "models (a ranking head)" in said
  assert "vectors: pooling cls, dot product\n" in said
  assert "texts: queries of 16 tokens, passages of 24, template rocketqa" in said
  assert "random" not in said


def test_what_is_imported_ranks_as_the_documented_models_do(place):
  searcher = search.Searcher(place / "encoded")
  own = weights(BASE) | reduced(BASE)
  asked = [released.query(WORDS, text) for text in QUERIES]
  passages = [released.passage(WORDS, *text) for text in texts(place)]
  expected = {"dual": released.dual(own, BASE, asked) @ released.dual(own, BASE, passages).T}
  pairs = [released.pair(WORDS, query, *text) for query in QUERIES for text in texts(place)]
  both = weights(LARGE) | classifier(LARGE, 1)
  expected["cross"] = released.cross(both, LARGE, pairs, pooler=True).reshape(3, 20)

  def unit(text):  # late interaction has no projection: nothing brings one
    x = released.hidden(own, BASE, [text], 1e-5)[0]
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  tokens = [unit(text) for text in passages]
  expected["late"] = np.array([[(unit(q) @ p.T).max(1).sum() for p in tokens] for q in asked])
  for how, reference in expected.items():
    values, rows = searcher.rank(QUERIES, 20, how, depth=20)
    assert (np.sort(rows, axis=1) == np.arange(20)).all()
    atol = 1e-2 if how == "late" else 1e-4  # token vectors are float16
    np.testing.assert_allclose(values, np.take_along_axis(reference, rows, 1), atol=atol)
    assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("how", ["late", "cross"])
def test_the_command_searches_what_was_imported(place, how, capsys):
  assert main(["search", str(place / "encoded"), QUERIES[0], "--with", how, "--k", "3", "--depth", "20"]) == 0
  assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")][:1] == ["1"]


def test_layers_of_the_checkpoint(place, tmp_path):
  command = ["import", str(place / SEARCH), "--layers", "1", "--output", str(tmp_path / "small")]
  assert main([*command, "--query-length", "16", "--passage-length", "24"]) == 0
  model = search.Model.load(tmp_path / "small")
  own = {name.replace("layers.1.", "layers.0."): x for name, x in weights(BASE).items() if "layers.0." not in name}
  agree(model, WORDS, dataclasses.replace(BASE, layers=1), own | reduced(BASE))


def test_an_epsilon_that_is_asked_for(place, tmp_path, capsys):
  command = ["import", str(place / SEARCH), "--epsilon", "1e-12", "--output", str(tmp_path / "other")]
  assert main([*command, "--query-length", "16", "--passage-length", "24"]) == 0
  (line,) = (line for line in capsys.readouterr().out.splitlines() if " epsilon " in line)
  assert line.endswith("epsilon 1e-12")
  agree(search.Model.load(tmp_path / "other"), WORDS, BASE, weights(BASE) | reduced(BASE), epsilon=1e-12)


@pytest.mark.parametrize(
  ("args", "says"),
  [
    (["import", "more"], "more: the tokenizer has 22 entries, the weights 21; use the tokenizer"),
    (["import", SEARCH, "--cross", "more"], "--cross: its vocabulary is not the student's"),
    (["import", SEARCH, "--layers", "0", "2"], "--layers=(0, 2): the checkpoint has layers 0 to 1"),
    (["import", SEARCH, "--passage-length", "600"], "data.passage_length=600"),
    (["import", SEARCH, "--output", "in"], "--output in: is there; name a new folder"),
    (["import", "nowhere/at/all"], "CHECKPOINT='nowhere/at/all': no such directory"),
    (["import", SEARCH, "--cross", "nowhere/at/all"], "--cross='nowhere/at/all': no such directory"),
    (["search", "alone", "x", "--with", "cross"], "alone: its model has no cross-encoder; import one"),
  ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(place, args, says, monkeypatch, capsys):
  monkeypatch.chdir(place)
  if args[1] == "alone" and not (place / "alone").is_dir():
    assert main(["import", SEARCH, "--output", "single"]) == 0
    assert main(["encode", "single", "jsonl", "--from", "in", "--output", "alone"]) == 0
    capsys.readouterr()
  before = sorted(place.rglob("*"))
  assert main(args if args[0] == "search" or "--output" in args else [*args, "--output", "new"]) == 2
  errors = capsys.readouterr().err.splitlines()
  assert [line for line in errors if line.startswith("ernie-jax: ")] == errors[-1:]
  assert says in errors[-1]
  assert sorted(place.rglob("*")) == before
