"""Live checks against torch, transformers, sentence-transformers, PyLate and ONNX Runtime (extra `interop`)."""
# ruff: noqa: E402

import dataclasses
import importlib
import re
import runpy
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'ernie-jax[interop]'")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'ernie-jax[interop]'")
import transformers
from test_export import DATA, DUAL, TASKS, TEXTS, made
from test_pretrained import filled, minilm  # noqa: F401 (a fixture)

from ernie_jax import config, hub, mesh, pretrained, retrieval, scores, templates, tokens
from ernie_jax.__main__ import main
from ernie_jax.encoder import Rows
from ernie_jax.export import export
from ernie_jax.search import Model

PASSAGES = ["A title: brown foxes jump over lazy dogs", "rain", "old birds sing of snow"]


@pytest.fixture(autouse=True)
def quiet():
  warnings.simplefilter("ignore")
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()


def noisy(model):
  """Random everywhere, norms and biases too."""
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model.eval()


@pytest.mark.parametrize("way", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize(
  ("kind", "settings"),
  [
    ("Ernie", {"use_task_id": True, "type_vocab_size": 4, "layer_norm_eps": 1e-5}),
    ("Ernie", {"use_task_id": False, "hidden_act": "relu", "max_position_embeddings": 513}),
    ("Ernie", {"use_task_id": True, "task_type_vocab_size": 16, "max_position_embeddings": 2048}),
    ("Bert", {"type_vocab_size": 2}),
  ],
)
def test_random_models_of_transformers_are_read(tmp_path, kind, settings, way):
  torch.manual_seed(0)
  common = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
  made = getattr(transformers, f"{kind}Config")(**common, intermediate_size=40, initializer_range=0.3, **settings)
  theirs = noisy(getattr(transformers, f"{kind}Model")(made))
  theirs.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if way == "sharded" else {}))
  if way == "bin":
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
  assert (tmp_path / "model.safetensors.index.json").exists() == (way == "sharded")
  checkpoint = pretrained.load(tmp_path, "")
  assert checkpoint.architecture.tasks == (made.task_type_vocab_size if settings.get("use_task_id") else 0)
  length = min(600, made.max_position_embeddings)
  ids = np.random.default_rng(0).integers(5, 60, (2, length))
  types = np.random.default_rng(1).integers(0, made.type_vocab_size, (2, length))
  with torch.no_grad():
    tasks = {"task_type_ids": torch.zeros_like(torch.tensor(ids))} if settings.get("use_task_id") else {}
    expected = theirs(input_ids=torch.tensor(ids), token_type_ids=torch.tensor(types), **tasks).last_hidden_state
  places = np.broadcast_to(np.arange(length), ids.shape)
  found = filled(checkpoint)(Rows(*(x.astype(np.int32) for x in (ids, np.ones_like(ids), places, types))))
  np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_all_hidden_states_of_minilm(minilm):  # noqa: F811
  """Every layer, on real texts, at every real token."""
  theirs = transformers.AutoModel.from_pretrained(minilm.directory, attn_implementation="eager").eval()
  stored = np.load(Path(__file__).parent / "fixtures" / "minilm.npz")
  texts = [*stored["texts"], *(p.read_text()[:400] for p in sorted(Path(config.__file__).parent.glob("*.py"))[:8])]
  inputs = transformers.AutoTokenizer.from_pretrained(minilm.directory)(
    list(map(str, texts)), padding=True, truncation=True, max_length=128, return_tensors="pt"
  )
  with torch.no_grad():
    expected = theirs(**inputs, output_hidden_states=True).hidden_states
  ids, real = inputs["input_ids"].numpy().astype(np.int32), inputs["attention_mask"].numpy() > 0
  places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
  rows = Rows(ids, real.astype(np.int32), places, np.zeros_like(ids))
  for n in range(1, 7):
    found = np.asarray(filled(minilm.with_layers(range(n), "layers"))(rows))
    assert np.abs(found - expected[n].numpy())[real].max() < 1e-5, n


def vectors(model: Model, texts: list[str], *, query: bool) -> np.ndarray:
  store = tokens.in_memory(texts, model.template.tokenizer)
  return model.encode(store, query=query, late=False).vectors


def test_minilm_through_sentence_transformers(minilm, tmp_path):  # noqa: F811
  """Released weights -> import -> export: ours, theirs, and sentence-transformers' own reading of the release."""
  cache = Path("~/.cache/ernie_jax").expanduser()
  assert hub.locate(hub.MINILM, cache)[0] == minilm.directory
  flags = ["--pooling", "mean", "--cosine", "True", "--passage-length", "128"]
  assert main(["import", hub.MINILM, "--output", str(tmp_path / "run"), *flags]) == 0
  export(tmp_path / "run", "sentence-transformers", tmp_path / "out")
  texts = [p.read_text()[:600] for p in sorted(Path(config.__file__).parent.glob("*.py"))[:16]]
  ours = vectors(Model.load(tmp_path / "run"), texts, query=False)
  exported = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
  body = sentence_transformers.models.Transformer(str(minilm.directory), max_seq_length=128)
  parts = [body, sentence_transformers.models.Pooling(384, "mean"), sentence_transformers.models.Normalize()]
  released = sentence_transformers.SentenceTransformer(modules=parts, device="cpu").encode(texts)
  np.testing.assert_array_equal(exported, released)
  cosine = (ours * exported).sum(1)
  assert cosine.min() > 0.99999
  np.testing.assert_allclose(ours, exported, atol=1e-5)


@pytest.mark.parametrize("settings", DUAL, ids=str)
def test_sentence_transformers_gives_our_vectors(tmp_path, settings):
  run = made(tmp_path / "run", **settings)
  export(run, "sentence-transformers", tmp_path / "out")
  theirs, ours = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu"), Model.load(run)
  texts = PASSAGES
  if settings.get("data", DATA).template == "rocketqa":
    # Their strings are one text of type 0; a title and a text are a pair.
    store = tokens.in_memory(["A title", "brown foxes"], ours.template.tokenizer)
    sep = np.array([ours.template.tokenizer.sep])
    joined = tokens.columns.ragged([np.concatenate([store[0], sep, store[1]])])
    own, pairs = ours.encode(joined, query=False, late=False).vectors, [("A title", "brown foxes")]
    np.testing.assert_allclose(theirs.encode(pairs), own, atol=1e-5)
  else:
    np.testing.assert_allclose(theirs.encode_document(texts), vectors(ours, texts, query=False), atol=1e-5)
  if ours.settings.tied:
    theirs.max_seq_length = DATA.query_length  # it has one length for both; two encoders have their own
  np.testing.assert_allclose(theirs.encode_query(TEXTS), vectors(ours, TEXTS, query=True), atol=1e-5)
  expected = vectors(ours, TEXTS, query=True) @ vectors(ours, TEXTS, query=True).T
  np.testing.assert_allclose(theirs.similarity(*[theirs.encode_query(TEXTS)] * 2), expected, rtol=1e-4, atol=1e-4)


MARKED = dataclasses.replace(DATA, markers=True, augment=True)


def token_vectors(model: Model, texts: list[str], *, query: bool) -> tuple[jax.Array, jax.Array]:
  """Float32 token vectors [N, L, D], and which are a text's: the model's own function, on padded rows."""
  t = model.template
  store = tokens.in_memory(texts, t.tokenizer)
  lay, length = (t.queries, t.data.query_length) if query else (t.passages, t.data.passage_length)
  parts = [t.query(store[i]) if query else t.passage(store[i]) for i in range(len(texts))]
  student, settings = model.params["student"], model.settings
  found = jax.jit(lambda s, rows: scores.embed(s, settings, rows, None, query=query))(student, lay(parts, length))
  return found.tokens, found.mask


@pytest.mark.parametrize("settings", [{}, {"late_width": None}, {"data": MARKED}, {"shape": TASKS}], ids=str)
def test_pylate_gives_our_maxsim(tmp_path, settings):
  models = pytest.importorskip("pylate.models")
  from pylate import scores as theirs

  run = made(tmp_path / "run", **settings)
  export(run, "pylate", tmp_path / "out")
  colbert, ours = models.ColBERT(str(tmp_path / "out"), device="cpu"), Model.load(run)
  (q, real_q), (p, real_p) = (token_vectors(ours, t, query=i) for t, i in ((TEXTS, True), (PASSAGES, False)))
  queries, passages = (colbert.encode(t, is_query=i) for t, i in ((TEXTS, True), (PASSAGES, False)))
  for (own, real), found in (((q, real_q), queries), ((p, real_p), passages)):
    for i, vector in enumerate(found):
      np.testing.assert_allclose(vector, own[i, real[i]], atol=1e-5)
  similarity = jax.numpy.einsum("qid,pjd->qpij", q, p)
  expected = scores.maxsim(similarity, real_q[:, None], real_p[None])
  alone = lambda x: torch.tensor(x)[None]
  found = [[float(theirs.colbert_scores(alone(a), alone(b))[0, 0]) for b in passages] for a in queries]
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"share_encoder": True}, {"shape": TASKS}], ids=str)
def test_cross_encoder_gives_our_logits(tmp_path, settings):
  run = made(tmp_path / "run", **settings)
  export(run, "cross-encoder", tmp_path / "out")
  theirs, ours = sentence_transformers.CrossEncoder(str(tmp_path / "out"), device="cpu"), Model.load(run)
  asked = ["brown foxes jump", "old birds sing", "lazy"]  # short: CrossEncoder cuts only both together
  queries, passages = (tokens.in_memory(t, ours.template.tokenizer) for t in (asked, PASSAGES))
  with jax.set_mesh(mesh.make()):
    own = retrieval.rerank_cross(ours.params, queries, passages, np.tile(np.arange(3), (3, 1)), ours.template)
  pairs = [(q, p) for q in asked for p in PASSAGES]
  np.testing.assert_allclose(theirs.predict(pairs).reshape(3, 3), own, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"shape": TASKS}, {"tied": False}], ids=str)
def test_auto_model_gives_our_hidden_states(tmp_path, settings):
  run = made(tmp_path / "run", **settings)
  export(run, "hf", tmp_path / "out")
  ours, place = Model.load(run), tmp_path / "out" / ("passage" if settings == {"tied": False} else "")
  theirs, tokenizer = (c.from_pretrained(place) for c in (transformers.AutoModel, transformers.AutoTokenizer))
  with torch.no_grad():
    expected = theirs(**tokenizer(PASSAGES[0], return_tensors="pt")).last_hidden_state
  store = tokens.in_memory(PASSAGES[:1], ours.template.tokenizer)
  rows = templates.rows([(store[0],)], expected.shape[1], ours.template.tokenizer)
  found, _ = jax.jit(lambda e, r: e(r))(ours.params["student"].encoder, rows)
  np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("to", ["sentence-transformers", "pylate", "cross-encoder", "hf", "onnx"])
def test_the_card_s_three_lines_run(tmp_path, monkeypatch, capsys, to):
  if to == "pylate":
    pytest.importorskip("pylate")
  export(made(tmp_path / "run", pooling="mean", cosine=True), to, tmp_path / "out")
  monkeypatch.chdir(tmp_path)
  code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)[1]
  (tmp_path / "card.py").write_text(code)
  runpy.run_path(str(tmp_path / "card.py"))
  assert re.search(r"\d\.\d", capsys.readouterr().out)
  assert len(code.strip().splitlines()) == 3


@pytest.fixture
def benchmarks(monkeypatch):
  """`benchmarks/steps.py` and `benchmarks/peers.py`: our step and PyTorch's, of random texts."""
  monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
  return importlib.import_module("steps"), importlib.import_module("peers")


@pytest.mark.parametrize("pool", ["own", "global"])
@pytest.mark.parametrize("pack", [None, 48])
def test_the_cascade_in_pytorch_has_our_loss_and_gradient(benchmarks, pool, pack):
  """All seven terms, padded and packed: an independent implementation, whose gradient is autograd's."""
  steps, peers = benchmarks
  a = config.Architecture(vocabulary=300, width=32, layers=2, heads=2, inner=64, special=(0, steps.CLS, steps.SEP))
  weights = config.Weights(1.0, 0.7, 0.9, 1.1, 0.6, 0.8, 0.5, 0, 0)
  temperature = config.Temperatures(dual=0.1, late=0.5, cross=2.0, attention=0.3)
  train = config.Train(batch=4, negatives=2, weights=weights, temperature=temperature, late_pool=pool)
  model = config.Model(scan=False, late_width=None, pooling="mean", cosine=True, dropout=0.0)
  params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x + 0.1, steps.parameters(model, a, a))
  texts = steps.Texts(train, config.Data(query_length=8, passage_length=24), share=0.6, vocabulary=300)
  with jax.set_mesh(mesh.make(jax.devices()[:1])):
    ours = steps.Runner(model, train, params, texts.batch(pack))
    ours()
  theirs = peers.Runner(params, train, texts.batch(), "cpu", autocast=False, compiled=False)
  theirs()
  assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)
  assert theirs.norm == pytest.approx(ours.norm, rel=1e-4)


def test_the_gpu_benchmark_runs_on_a_cpu_and_its_sides_agree(benchmarks, monkeypatch, capsys):
  gpu = importlib.import_module("gpu")
  small = "--layers 2 --width 64 --queries 4 --passages 2 --vocabulary 500 --turns 1 --no-compile"
  monkeypatch.setattr("sys.argv", ["gpu.py", *small.split()])
  gpu.main()
  rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
  assert [" ".join(row[:2]).strip("| ") for row in rows] == [
    *(f"dual {side}" for side in ("ours, padded", "ours, packed", "torch", "sentence-transformers")),
    *(f"cascade {side}" for side in ("ours, padded", "ours, packed", "torch")),
  ]
  assert all(float(row[2]) > 0 for row in rows)
