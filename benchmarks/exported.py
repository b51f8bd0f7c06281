"""A finished run exported to every layout, and what the tools make of it beside what we do, as a Markdown table.

  python benchmarks/exported.py runs/quickstart        (extra `interop`)

All dev queries over the run's whole corpus; late interaction and cross-encoder score the dual-encoder's 10 best.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import sentence_transformers
import tokenizers
import torch
import transformers
from pylate import models
from pylate import scores as pylate_scores

from ernie_jax import datasets, evaluate, mesh, progress, retrieval, scores, tokens, topk
from ernie_jax.encoder import Rows
from ernie_jax.export import export
from ernie_jax.search import Joined, Model, Searcher

DEPTH = 10

warnings.simplefilter("ignore")
progress.silence()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
run = Path(sys.argv[1])
searcher = Searcher(run)
model: Model = searcher.model
t, corpus = model.template, searcher.corpus.passages
data = datasets.load(searcher.data)
if data.fingerprint != searcher.corpus.about["corpus"]:
  sys.exit("the data set is another one than the run's")
queries, qrels = data.queries["dev"], data.qrels("dev")
asked, passages = queries.texts[:], Joined(corpus.titles, corpus.texts)[:]
place = Path(tempfile.mkdtemp())
for layout in ("sentence-transformers", "pylate", "cross-encoder", "onnx"):
  export(run, layout, place / layout)


def mrr(q: np.ndarray, p: np.ndarray) -> float:
  found = topk.top_k(q.astype(np.float32), p.astype(np.float32), 100, order=corpus.order)
  return float(np.mean(list(evaluate.per_query(searcher.as_run(queries.ids, *found), qrels, "MRR@10").values())))


def row(*cells: object) -> None:
  print("| " + " | ".join(f"{c:.2e}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


store = tokens.in_memory(asked, t.tokenizer)
ours = model.encode(store, query=True, late=False).vectors
_, found = searcher.nearest(ours, DEPTH)
print(f"{len(asked)} queries, {len(passages)} passages\n")
row("model", "what", "ours", "theirs", "largest difference")
row(*["---"] * 5)

theirs = sentence_transformers.SentenceTransformer(str(place / "sentence-transformers"), device="cpu")
p = theirs.encode_document(passages)
theirs.max_seq_length = t.data.query_length
q = theirs.encode_query(asked)
values = [f"{mrr(ours, searcher.corpus.vectors[:]):.4f}", f"{mrr(q, p):.4f}"]
away = max(np.abs(q - ours).max(), np.abs(p - searcher.corpus.vectors[:]).max())
row(f"sentence-transformers {sentence_transformers.__version__}", "dual-encoder, MRR@10, vectors", *values, float(away))

# Late interaction in float32: what `encode` keeps is float16.
embed = jax.jit(
  lambda s, rows, query: scores.embed(s, model.settings, rows, None, query=query), static_argnames="query"
)
student, candidates = model.params["student"], np.unique(found)
rows = {
  True: t.queries([t.query(store[i]) for i in range(len(asked))], t.data.query_length),
  False: t.passages([t.passage(x) for x in map(searcher.tokens(candidates).__getitem__, range(len(candidates)))],
                    t.data.passage_length),
}  # fmt: skip


def token_vectors(query: bool) -> list[np.ndarray]:
  made: list[np.ndarray] = []
  for begin in range(0, len(rows[query].tokens), 64):
    part = jax.tree.map(lambda x: x[begin : begin + 64], rows[query])
    e = embed(student, part, query)
    made += [x[m] for x, m in zip(np.asarray(e.tokens), np.asarray(e.mask))]
  return made


colbert = models.ColBERT(str(place / "pylate"), device="cpu")
own_q, own_p = token_vectors(True), token_vectors(False)
their_q = colbert.encode(asked, is_query=True)
their_p = colbert.encode([passages[i] for i in candidates], is_query=False)
late: list[tuple[float, float]] = []
for i, line in enumerate(found):
  for j in np.searchsorted(candidates, line):
    mine = float((own_q[i] @ own_p[j].T).max(1).sum())
    other = pylate_scores.colbert_scores(torch.tensor(their_q[i])[None], torch.tensor(their_p[j])[None])
    late.append((mine, float(other)))
pairs = np.array(late)
away = np.abs(pairs[:, 0] - pairs[:, 1]).max()
row("PyLate", f"MaxSim of {len(pairs)} pairs, mean", *[f"{x:.4f}" for x in pairs.mean(0)], float(away))

with jax.set_mesh(mesh.make()):
  every = tokens.in_memory([passages[i] for i in candidates], t.tokenizer)
  logits = retrieval.rerank_cross(model.params, store, every, np.searchsorted(candidates, found), t)
cross = sentence_transformers.CrossEncoder(str(place / "cross-encoder"), device="cpu")
backend = t.tokenizer.backend


def cut(text: str, length: int) -> str:
  """The text of the tokens that were read in training."""
  offsets = backend.encode(text, add_special_tokens=False).offsets
  return text if len(offsets) <= length - 2 else text[: offsets[length - 3][1]]


short = [cut(q, t.data.query_length) for q in asked], {i: cut(passages[i], t.data.passage_length) for i in candidates}
kept = np.array([
  [backend.encode(short[0][i], add_special_tokens=False).ids == t.query(store[i]).tolist()
   and backend.encode(short[1][c], add_special_tokens=False).ids == t.passage(every[j])[0].tolist()
   for c, j in zip(line, np.searchsorted(candidates, line))]
  for i, line in enumerate(found)
])  # fmt: skip
given = cross.predict([(short[0][i], short[1][c]) for i, line in enumerate(found) for c in line]).reshape(found.shape)
plain = cross.predict([(asked[i], passages[c]) for i, line in enumerate(found) for c in line]).reshape(found.shape)
fits = np.array([
  [len(store[i]) <= t.data.query_length - 2 and len(every[j]) <= t.data.passage_length - 2
   for j in np.searchsorted(candidates, line)]
  for i, line in enumerate(found)
])  # fmt: skip


def compared(what: str, other: np.ndarray, which: np.ndarray) -> None:
  mean = [f"{x[which].mean():.4f}" for x in (logits, other)]
  row("CrossEncoder", f"{what}: {which.sum()} of {which.size} pairs, mean", *mean,
      float(np.abs(logits - other)[which].max()))  # fmt: skip


compared("texts as they are, none cut", plain, fits)
compared("cut as in training", given, kept)
compared("cut as CrossEncoder does", plain, ~fits)
ranked = [evaluate.per_query(searcher.as_run(queries.ids, *retrieval.reorder(found, x)), qrels, "MRR@10")
          for x in (logits, given, plain)]  # fmt: skip
means = [f"{np.mean(list(values.values())):.4f}" for values in ranked]
row("CrossEncoder", "MRR@10 re-ranked, cut as in training", *means[:2], "")
row("CrossEncoder", "MRR@10 re-ranked, cut as CrossEncoder does", means[0], means[2], "")

inputs_of = tokenizers.Tokenizer.from_file(str(place / "onnx" / "tokenizer.json"))
for kind in ("dual", "late", "cross"):
  session = onnxruntime.InferenceSession(str(place / "onnx" / f"{kind}.onnx"))
  worst, shapes = 0.0, []
  for size, length in ((1, 12), (7, 33), (32, t.data.passage_length)):
    inputs_of.enable_padding(length=length)
    inputs_of.enable_truncation(length)
    texts = [passages[i] for i in candidates[:size]]
    read = inputs_of.encode_batch([(asked[0], x) for x in texts] if kind == "cross" else texts)
    fed = {"input_ids": [e.ids for e in read], "attention_mask": [e.attention_mask for e in read],
           "token_type_ids": [e.type_ids for e in read]}  # fmt: skip
    fed = {name: np.array(x, np.int64) for name, x in fed.items()}
    got = session.run(None, fed)[0]
    ids, mask, kinds = (fed[name].astype(np.int32) for name in ("input_ids", "attention_mask", "token_type_ids"))
    laid = Rows(ids, mask, np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape), kinds)
    if kind == "cross":
      mine = np.asarray(jax.jit(lambda p, r: scores.cross(p, r, None)[0])(model.params, laid))
    else:
      e = embed(student, laid, False)
      mine = np.asarray(e.vector if kind == "dual" else e.tokens)
    real = mask > 0 if kind == "late" else ...
    worst = max(worst, float(np.abs(got - mine)[real].max()))
    shapes.append(f"{size} x {length}")
  row(f"ONNX Runtime {onnxruntime.__version__}", f"{kind}: {', '.join(shapes)}", "", "", worst)
