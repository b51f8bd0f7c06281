"""The main job on a laptop's CPU: all-MiniLM-L6-v2 on the docstrings of installed packages.

  bash launch/quickstart.sh          (or: ernie-jax run configs/quickstart.py --output runs/quickstart)

Measured on 2 shared CPU cores, 3 seeds (RESULTS.md): 18 minutes with installation, 4.8 GB; test MRR@10 of the
dual-encoder 0.637 +- 0.008, of BM25 0.549.
"""

from ernie_jax.config import Config, Data, Evaluate, Mine, Model, Optimizer, Temperatures, Train, Weights

temperature = Temperatures(dual=0.05, late=0.5, cross=1.0, attention=0.1)

config = Config(
  data=Data(query_length=20, passage_length=64),
  model=Model(
    start="sentence-transformers/all-MiniLM-L6-v2",
    pooling="mean",
    cosine=True,
    late_width=None,
    dropout=0.0,
    scan=False,
  ),
  interaction=Train(
    steps=88,
    batch=64,
    weights=Weights.only(nll_de=1, nll_li=1, kl_li_de=1),
    temperature=temperature,
    late_pool="global",
    optimizer=Optimizer(learning_rate=1e-4),
  ),
  mine=Mine(first=1, last=30),
  warmup=Train(steps=60, batch=8, negatives=3, weights=Weights.only(nll_ce=1), optimizer=Optimizer(learning_rate=1e-4)),
  cascade=Train(
    steps=40,
    batch=8,
    negatives=3,
    weights=Weights(dualreg_query=0, dualreg_passage=0),
    temperature=temperature,
    optimizer=Optimizer(learning_rate=2e-5),
  ),
  evaluate=Evaluate(late_depth=100, cross_depth=10, teacher_queries=100),
)
