"""ERNIE-Search in JAX: a cross-encoder teaches a late-interaction model that teaches a dual-encoder, in one step.

The paper (Lu et al., 2022, arXiv 2205.09153) and the files that hold it, in the order in which data flows:

  settings, defaults, checks            config.py
  Ctrl-C and SIGTERM                    signals.py
  devices and hosts                     mesh.py
  exact search, in tiles                topk.py
  products, GELU: rounding and error    kernels.py
  ERNIE/BERT encoder                    encoder.py
  the three scorers                     scores.py
  the loss terms, DualReg               losses.py
  one jitted training step              step.py
  FLOPs, chips, utilisation             cost.py
  progress of long jobs                 progress.py
  columns on disk                       columns.py
  texts, queries, judgements            datasets/
  tokenizer and token store             tokens.py
  templates, rows of tokens             templates.py
  words of the corpus, masked           masking.py
  titles and sentences as queries       pseudo.py
  lists, hard negatives, packed batches batches.py
  where checkpoints lie                 hub.py
  state and data position on disk       checkpoints.py
  others' names of parameters           names.py
  arrays out of others' pickles         unpickle.py
  released weights, by our names        pretrained.py
  the training loop                     train.py
  words, the BM25 index                 bm25.py
  encoding, re-ranking                  retrieval.py
  an encoded corpus on disk             collection.py
  FAISS and Milvus                      index.py
  search over it, with hits             search.py
  metrics                               evaluate.py
  hard negatives                        mining.py
  attention maps of some pairs          attention.py
  charts, tables, the page around them  draw.py
  curves and tables as one page         report.py
  the training strategy, stage by stage recipe.py
  the method without each of its parts  ablate.py
  a pod run, planned by the compiler    plan.py
  the scorers as ONNX graphs            graph.py
  others' layouts of a model            export.py
  the search service and its page       serve.py
  verbs and their flags                 verbs.py
  the command line                      __main__.py

Each file imports only files above it. Shape letters, the same everywhere:

  B queries of a global batch   K passages of a query's list (the positive first, then n hard negatives)
  P pool: all B*K passages      N texts of any kind     Lq, Lp, Lj tokens of a query, a passage, a joined pair
  H hidden width                D late-interaction width     L tokens of any row    C candidates of a softmax
"""

__version__ = "0.1.0"
