"""Models in PaddleNLP's and RocketQA's files: what is read scores as the documented model does, in float64."""

import dataclasses
import functools
import json

import jax
import numpy as np
import paddle
import pytest
from paddle import ERNIE_1_BASE, ERNIE_2_BASE, ERNIE_2_LARGE, ERNIE_3_BASE

from ernie_jax import config, hub, pretrained, scores, search

ENGLISH = "a quick brown fox jumps over the lazy dog rivers mountains rain sun old young birds"
WORDS = [*paddle.SPECIAL, *ENGLISH.split()]
SIGNS = [*paddle.SPECIAL, *"天地玄黄宇宙洪荒日月盈昃辰宿列张"]
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
  q = [paddle.query(vocabulary, said(vocabulary, own)) for own in QUERIES]
  p = [
    paddle.passage(vocabulary, said(vocabulary, title), said(vocabulary, text))
    if titles
    else paddle.query(vocabulary, said(vocabulary, text))
    for title, text in PASSAGES
  ]
  return paddle.dual(queries, shape, q, **more), paddle.dual(passages, shape, p, **more)


def logits(model, vocabulary):
  """Of every query with every passage [3, 3]."""
  t = model.template
  q = [t.query(x) for x in t.tokenizer.encode([said(vocabulary, own) for own in QUERIES]) for _ in PASSAGES]
  p = [t.passage(x) for _ in QUERIES for x in stored(t, vocabulary)]
  return np.asarray(cross(model.params, t.pairs(q, p, 40))).reshape(3, 3)


def expected_logits(vocabulary, shape, weights, *, pooler, **more):
  """[3, 3, classes]"""
  own = functools.partial(said, vocabulary)
  pairs = [paddle.pair(vocabulary, own(q), own(title), own(text)) for q in QUERIES for title, text in PASSAGES]
  return paddle.cross(weights, shape, pairs, pooler=pooler, **more).reshape(3, 3, -1)


def close(found, expected):
  """float32 beside float64, on values of order 1."""
  assert 0.3 < np.abs(expected).max() < 30
  np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL)


ATOL = 1e-5


# ---- Forms ---------------------------------------------------------------------------------------------------------


def prefixed(weights, prefix="ernie."):
  """As a model with heads has them: the encoder and its pooler below, heads beside them."""
  inside = ("embeddings.", "encoder.", "pooler.")
  return {prefix + name if name.startswith(inside) else name: x for name, x in weights.items()}


@functools.cache
def weights(shape, seed=0):
  return paddle.encoder(shape, seed)


def reduced(shape, width=10):
  return paddle.linear("emb_reduce_linear", shape.width, width, 7)


def classifier(shape, classes, seed=8):
  return paddle.linear("classifier", shape.width, classes, seed)


SEARCH = "ernie-search-base-dual-encoder-marco-en"
FORMS = {
  "prefixed": lambda: prefixed(weights(BASE) | classifier(BASE, 2)),
  "unprefixed": lambda: weights(BASE),
  "reduced": lambda: prefixed(weights(BASE) | classifier(BASE, 2) | reduced(BASE)),
  "pre-training's leftovers": lambda: prefixed(weights(BASE) | paddle.masked_language_model(BASE)),
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
  found = read(paddle.paddlenlp(tmp_path / SEARCH, arrays, paddle.settings(BASE), WORDS, old=old))
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
  found = read(paddle.paddlenlp(tmp_path / "rocketqa-v1-marco", arrays, paddle.settings(BASE), WORDS))
  assert not found.model["tied"]
  agree(adopted(found, None, tmp_path / "model"), WORDS, BASE, query, title)


@pytest.mark.parametrize("prefix", ["ernie.", "ernie.ernie.", ""])
def test_ernie_search_cross_encoder(prefix, tmp_path):
  own = weights(LARGE) | classifier(LARGE, 1)
  arrays = prefixed(own, prefix)
  if prefix == "ernie.ernie.":  # the state of PaddleNLP's ErnieCrossEncoder
    arrays = {name.replace("classifier", "ernie.classifier"): x for name, x in arrays.items()}
  place = tmp_path / "ernie-search-large-cross-encoder-marco-en"
  other = read(paddle.paddlenlp(place, arrays, paddle.settings(LARGE), WORDS), teacher=True)
  student = read(paddle.paddlenlp(tmp_path / SEARCH, weights(BASE), paddle.settings(BASE), WORDS))
  assert other.notes == ("LayerNorm's epsilon is 1e-05, as in RocketQA's and ERNIE-Search's models (a ranking head)",)
  model = adopted(student, other, tmp_path / "model")
  close(logits(model, WORDS), expected_logits(WORDS, LARGE, own, pooler=True)[..., 0])
  assert model.crosses


def test_rocketqa_v2s_cross_encoder_reads_no_pooler_if_there_is_one(tmp_path):
  own = weights(BASE) | classifier(BASE, 1)
  place = tmp_path / "rocketqav2-en-marco-cross-encoder"
  other = read(paddle.paddlenlp(place, prefixed(own), paddle.settings(BASE), WORDS), teacher=True)
  assert any("its pooler is left out" in note for note in other.notes)
  model = adopted(other, other, tmp_path / "model")
  close(logits(model, WORDS), expected_logits(WORDS, BASE, own, pooler=False)[..., 0])


def test_ernie_3_keeps_the_epsilon_of_its_configuration(tmp_path):
  own = weights(CHINESE)
  found = read(paddle.paddlenlp(tmp_path / "ernie-3.0-base-zh", prefixed(own), paddle.settings(CHINESE), SIGNS))
  a = found.architecture
  assert (a.tasks, a.positions, a.types, a.inner, a.epsilon) == (3, 2048, 4, 40, 1e-12)
  assert found.notes == ()
  agree(adopted(found, None, tmp_path / "model"), SIGNS, CHINESE, own, titles=False, epsilon=1e-12)


@pytest.mark.parametrize("old", [False, True])
def test_ernie_1_and_a_vocabulary_of_numbered_lines(old, tmp_path):
  own = prefixed(weights(FIRST) | paddle.masked_language_model(FIRST))
  folder = paddle.paddlenlp(tmp_path / "ernie-1.0", own, paddle.settings(FIRST), SIGNS, old=old, numbered=True)
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
  variables = paddle.static(passage, "titlepara_") | ({} if shared else paddle.static(query, "query_"))
  about = {"model_type": "dual_encoder", "share_parameter": int(shared)} | LENGTHS
  found = read(paddle.rocketqa(tmp_path / "de", variables, shape, vocabulary, **about))
  assert found.model["tied"] == shared
  assert "(one file for each variable)" in found.notes[0]
  assert [note for note in found.notes if "for_cn" in note] == list(found.notes[1:])
  assert len(found.notes) == (2 if shape is FIRST else 1)
  assert found.data == {"template": "rocketqa", "query_length": 16, "passage_length": 24}
  agree(adopted(found, None, tmp_path / "model"), vocabulary, shape, passage if shared else query, passage)


def test_shared_parameters_are_the_passages_even_where_queries_left_some(tmp_path):
  variables = paddle.static(weights(BASE, 1), "titlepara_") | paddle.static(weights(BASE), "query_")
  found = read(paddle.rocketqa(tmp_path / "de", variables, BASE, WORDS, share_parameter=1, **LENGTHS))
  assert found.query_encoder == {}
  agree(adopted(found, None, tmp_path / "model"), WORDS, BASE, weights(BASE, 1))


def test_rocketqa_cross_encoder_ranks_by_the_difference_of_its_classes(tmp_path):
  own = weights(FIRST) | classifier(FIRST, 2)
  about = {"model_type": "cross_encoder", "max_seq_len": 40}
  folder = paddle.rocketqa(tmp_path / "ce", paddle.static(own, ""), FIRST, SIGNS, **about)
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
  variables = paddle.static({name: x for name, x in both.items() if name not in pooled}, "qtp_")
  for prefix, own in (("query_", query), ("titlepara_", passage)):
    variables |= paddle.static({name: x for name, x in own.items() if name not in pooled}, prefix)
  folder = paddle.rocketqa(tmp_path / "joint", variables | paddle.static(pooled, ""), BASE, WORDS, **LENGTHS)
  student, other = read(folder), read(folder, teacher=True)
  assert other.pooler == {}
  model = adopted(student, other, tmp_path / "model")
  agree(model, WORDS, BASE, query, passage)
  close(logits(model, WORDS), expected_logits(WORDS, BASE, both, pooler=False)[..., 0])
  assert model.crosses
