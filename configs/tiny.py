"""The whole recipe in about a minute on one core: standard library, from scratch. What tests and smoke runs use.

  ernie-jax run configs/tiny.py --output runs/tiny

Measured on one shared CPU core (RESULTS.md): 57 s, 1:10 the first time, which prepares the data; 40 s is compilation.
"""

from ernie_jax.config import (
  Architecture,
  Config,
  Data,
  Evaluate,
  Mine,
  Model,
  Optimizer,
  Temperatures,
  Train,
  Weights,
)

fast = Optimizer(learning_rate=2e-3)
temperature = Temperatures(dual=0.05, late=0.5)

config = Config(
  data=Data(packages=("python",), query_length=16, passage_length=32, pack=64),
  model=Model(
    scratch=Architecture(vocabulary=4000, width=64, layers=1, heads=2, inner=128, attention_dropout=0.0),
    pooling="mean",
    cosine=True,
    late_width=32,
    scan=False,
  ),
  interaction=Train(
    steps=40,
    batch=32,
    weights=Weights.only(nll_de=1, nll_li=1, kl_li_de=1),
    temperature=temperature,
    late_pool="global",
    optimizer=fast,
    checkpoint_every=10,
    measure_every=20,
  ),
  mine=Mine(first=1, last=20),
  warmup=Train(steps=10, batch=8, negatives=2, weights=Weights.only(nll_ce=1), optimizer=fast, checkpoint_every=5),
  cascade=Train(steps=10, batch=8, negatives=2, temperature=temperature, optimizer=fast, checkpoint_every=5),
  evaluate=Evaluate(
    late_depth=20, cross_depth=5, teacher_depth=5, teacher_queries=50, dev_queries=50, dev_passages=200
  ),
)
