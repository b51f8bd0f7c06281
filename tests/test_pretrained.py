"""Released weights: parity with the reference implementation (stored), and checkpoints that do not fit."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ernie_jax import config, hub, pretrained, scores, step, templates, tokens
from ernie_jax.config import UserError
from ernie_jax.encoder import Encoder, Rows

FIXTURES = Path(__file__).parent / "fixtures"


def filled(checkpoint, scan=True):
  """Our encoder with the checkpoint's weights, no dropout; random ones are never made, for that takes longest."""
  model = config.Model(scan=scan)
  a = checkpoint.architecture
  shapes = jax.eval_shape(lambda: step.init_params(model, a, a, jax.random.key(0)))
  params, _ = pretrained.assign(shapes, checkpoint, None)
  run = jax.jit(lambda encoder, rows: encoder(rows)[0])
  return lambda rows: run(params["student"].encoder, rows)


@pytest.fixture(scope="module")
def minilm():
  try:
    return pretrained.load(*hub.locate(hub.MINILM, Path("~/.cache/ernie_jax").expanduser()))
  except hub.Unreachable as error:
    pytest.skip(str(error))


@pytest.mark.parametrize("scan", [True, False])
def test_minilm_equals_the_reference_on_real_text(minilm, scan):
  stored = np.load(FIXTURES / "minilm.npz")
  tokenizer = tokens.Tokenizer.load(minilm.directory)
  store = tokens.in_memory(stored["texts"].tolist(), tokenizer)
  rows = templates.rows([[store[i]] for i in range(len(store))], stored["tokens"].shape[1], tokenizer)
  np.testing.assert_array_equal(rows.tokens, stored["tokens"])
  real = stored["mask"] > 0
  np.testing.assert_array_equal(rows.segments > 0, real)
  difference = np.abs(np.asarray(filled(minilm, scan)(rows)) - stored["hidden"])[real]
  assert difference.max() < 1e-5


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6])
def test_each_layer_of_minilm_equals_the_reference(minilm, layers):
  """The first layers alone give that layer's hidden states."""
  stored = np.load(FIXTURES / "minilm.npz")
  ids = stored["tokens"][-1][stored["mask"][-1] > 0].astype(np.int32)[None]
  rows = Rows(ids, np.ones_like(ids), np.arange(ids.size, dtype=np.int32)[None], np.zeros_like(ids))
  found = filled(minilm.with_layers(range(layers), "layers"))(rows)
  assert np.abs(np.asarray(found[0]) - stored["layers"][layers]).max() < 1e-5


@pytest.mark.parametrize(
  ("name", "tasks", "activation", "positions", "epsilon"),
  [
    ("ernie", 3, "relu", 20, 1e-5),  # task embeddings
    ("ernie_zh", 0, "relu", 513, 1e-12),
    ("ernie_en", 0, "gelu", 20, 1e-12),
  ],
)
def test_ernie_equals_the_reference(name, tasks, activation, positions, epsilon):
  stored = np.load(FIXTURES / f"{name}.npz")
  checkpoint = pretrained.load(FIXTURES / name, "fixture")
  a = checkpoint.architecture
  assert (a.tasks, a.activation, a.positions, a.epsilon) == (tasks, activation, positions, epsilon)
  ids = stored["tokens"].astype(np.int32)
  places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
  rows = Rows(ids, np.ones_like(ids), places, stored["types"].astype(np.int32))
  np.testing.assert_allclose(filled(checkpoint)(rows), stored["hidden"], atol=1e-5)


@pytest.fixture
def copy(tmp_path):
  shutil.copytree(FIXTURES / "ernie", tmp_path / "ernie")
  return tmp_path / "ernie"


def edit(folder: Path, change) -> None:
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def test_task_embeddings_follow_the_tensors_not_the_configuration(copy):
  edit(copy, lambda t: t.pop("embeddings.task_type_embeddings.weight"))
  assert json.loads((copy / "config.json").read_text())["use_task_id"] is True
  assert pretrained.load(copy, "").architecture.tasks == 0


def test_a_prefix_of_the_names_is_read_over(copy):
  expected = pretrained.load(copy, "").encoder

  def rename(tensors):
    for name in list(tensors):
      tensors[f"ernie.{name}"] = tensors.pop(name)

  edit(copy, rename)
  for name, x in pretrained.load(copy, "").encoder.items():
    np.testing.assert_array_equal(x, expected[name])


def test_old_names_of_norms_are_read(copy):
  expected = pretrained.load(copy, "").encoder

  def rename(tensors):
    for name in list(tensors):
      if "LayerNorm" in name:
        tensors[name.replace(".weight", ".gamma").replace(".bias", ".beta")] = tensors.pop(name)

  edit(copy, rename)
  for name, x in pretrained.load(copy, "").encoder.items():
    np.testing.assert_array_equal(x, expected[name])


def test_the_head_of_masked_language_modelling_is_taken_over_whole_or_not_at_all(copy):
  """Its logits are those of BERT's `cls.predictions`, whose decoder is the word embeddings."""
  encoder = pretrained.load(copy, "")
  a, rng = dataclasses.replace(encoder.architecture, activation="relu"), np.random.default_rng(0)
  shapes = {"transform.dense.weight": (a.width, a.width), "transform.dense.bias": (a.width,), "bias": (a.vocabulary,)}
  shapes |= {f"transform.LayerNorm.{name}": (a.width,) for name in ("gamma", "beta")}
  head = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  edit(copy, lambda tensors: tensors.update({f"cls.predictions.{name}": x for name, x in head.items()}))
  found = pretrained.load(copy, "")
  made = {"masked": scores.Masked(a, jax.random.key(0)), "encoder": Encoder(a, jax.random.key(0))}
  params, random = pretrained.assign(made, found, None)
  assert not any(name.startswith("masked") for name in random)
  words = np.asarray(params["encoder"].word.embedding[...])
  hidden = rng.normal(size=(2, 3, a.width)).astype(np.float32)
  x = np.maximum(hidden @ head["transform.dense.weight"].T + head["transform.dense.bias"], 0)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + a.epsilon)
  x = x * head["transform.LayerNorm.gamma"] + head["transform.LayerNorm.beta"]
  found_logits = params["masked"](jnp.asarray(hidden), params["encoder"])
  np.testing.assert_allclose(found_logits, x @ words.T + head["bias"], rtol=1e-4, atol=1e-5)
  edit(copy, lambda tensors: tensors.pop("cls.predictions.bias"))
  assert pretrained.load(copy, "").masked == {}
  assert any(name.startswith("masked") for name in pretrained.assign(made, pretrained.load(copy, ""), None)[1])


def test_a_cross_encoders_logit_is_taken_over(copy):
  weight = np.arange(16, dtype=np.float32)[None]
  edit(copy, lambda t: t.update({"classifier.weight": weight, "classifier.bias": np.float32([3])}))
  checkpoint = pretrained.load(copy, "")
  a = checkpoint.architecture
  params, _ = pretrained.assign(step.init_params(config.Model(), a, a, jax.random.key(0)), checkpoint, checkpoint)
  np.testing.assert_array_equal(params["teacher"].head.kernel[...], weight.T)
  np.testing.assert_array_equal(params["teacher"].head.bias[...], [3])
  edit(copy, lambda t: t.update({"classifier.weight": np.zeros((2, 16), np.float32)}))
  assert pretrained.load(copy, "").head == {}  # two classes are no ranking score


def test_the_digest_follows_the_weights(copy):
  before = pretrained.load(copy, "").digest()
  assert pretrained.load(copy, "elsewhere").digest() == before
  edit(copy, lambda t: t.update({"embeddings.LayerNorm.bias": t["embeddings.LayerNorm.bias"] + 1}))
  assert pretrained.load(copy, "").digest() != before


def test_a_checkpoint_without_a_pooler_has_none(copy):
  edit(copy, lambda t: [t.pop(name) for name in list(t) if "pooler" in name])
  assert pretrained.load(copy, "").pooler == {}


def test_missing_and_misshaped_tensors_are_named_at_once(copy):
  def spoil(tensors):
    tensors.pop("encoder.layer.1.output.dense.bias")
    tensors["embeddings.LayerNorm.weight"] = np.ones(3, np.float32)

  edit(copy, spoil)
  with pytest.raises(UserError) as error:
    pretrained.load(copy, "")
  assert "encoder.layer.1.output.dense.bias (missing)" in str(error.value)
  assert "embeddings.LayerNorm.weight ((3,) instead of (16,))" in str(error.value)


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("config.json", None, "missing"),
    ("config.json", "{", "not valid JSON"),
    ("config.json", '{"model_type": "gpt2"}', "bert or ernie"),
    ("config.json", '{"model_type": "bert"}', "lacks 'vocab_size'"),
    ("model.safetensors", None, "missing"),
    ("model.safetensors", "", "damaged"),
    ("model.safetensors", "x" * 99, "damaged"),
  ],
)
def test_damaged_checkpoints_are_one_line(copy, name, content, says):
  (copy / name).unlink()
  if content is not None:
    (copy / name).write_text(content)
  with pytest.raises(UserError, match=says) as error:
    pretrained.load(copy, "")
  assert name in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", ["./nowhere", "/nowhere/at/all", "a", "a/b/c"])
def test_a_path_that_is_none_is_one_line(start, tmp_path):
  with pytest.raises(UserError, match="no such directory"):
    hub.locate(start, tmp_path)


def test_a_changed_weight_file_is_refused(minilm, tmp_path):
  if "package" not in minilm.source:
    pytest.skip("the weights came from the hub")
  folder = tmp_path / "weights" / "all-MiniLM-L6-v2"
  shutil.copytree(minilm.directory, folder)
  raw = bytearray((folder / "vocab.txt").read_bytes())
  raw[1000] ^= 1
  (folder / "vocab.txt").write_bytes(raw)
  with pytest.raises(UserError, match="SHA-256"):
    hub.locate(hub.MINILM, tmp_path)


def test_every_parameter_of_both_towers_is_assigned():
  checkpoint = pretrained.load(FIXTURES / "ernie", "fixture")
  a = checkpoint.architecture
  model = config.Model(tied=False)
  before = step.init_params(model, a, a, jax.random.key(0))
  after, random = pretrained.assign(before, checkpoint, checkpoint)
  assert random == ["student.projection", "teacher.head"]
  names = jax.tree.leaves(step.names(before))
  pairs = zip(names, jax.tree.leaves(before), jax.tree.leaves(after))
  same = {name for name, x, y in pairs if np.array_equal(x, y)}
  assert same == {"student.projection.kernel", "teacher.head.kernel", "teacher.head.bias"}
  np.testing.assert_array_equal(
    after["student"].query_encoder.layers.up.kernel[...][1], checkpoint.encoder["layers.up.kernel"][1]
  )


def test_shapes_are_those_of_the_encoder():
  a = config.Architecture(vocabulary=7, width=4, heads=2, layers=2, inner=8, tasks=2)
  tree = Encoder(a, jax.random.key(0))
  assert list(pretrained.shapes(a).values()) == [x.shape for x in jax.tree.leaves(tree)]
  assert dataclasses.replace(a, tasks=0).tasks == 0
