"""A small student under a larger teacher: the first three layers of all-MiniLM-L6-v2 learn from a cross-encoder of six.

  pip install pandas matplotlib scikit-learn sympy networkx statsmodels scikit-image       (their docstrings are read)
  ernie-jax run configs/quickstart.py --warmup.steps 0 --cascade.steps 0 --output runs/quickstart
  ernie-jax export runs/quickstart --to hf --output runs/encoder           (where the cross-encoder's encoder starts)
  ernie-jax ablate configs/small_student.py --output runs/small_student --rows de_only no_teacher uniform_teacher

Measured on 2 CPU cores, three seeds (RESULTS.md): above the dual-encoder's own loss in both rankers, above the uniform
teacher in the dual-encoder, 0.002 above training without a cross-encoder, which may be chance.
`--model.dtype mixed`, which was used, is for a CPU with products of bfloat16.
"""

import dataclasses

import quickstart

from ernie_jax.config import Data, Evaluate, Optimizer, Temperatures, Train, Weights

settings = quickstart.config
# At `calibrated`, each ranker's probabilities over hard lists are as sure as they are right, on dev; over the easy
# negatives of a batch, `temperature` does that.
temperature = Temperatures(dual=0.02, late=0.25, cross=1.0, attention=0.1)
calibrated = Temperatures(dual=0.03, late=0.6, cross=1.4, attention=0.1)

config = dataclasses.replace(
  settings,
  data=dataclasses.replace(
    settings.data,
    packages=(
      *Data().packages,
      *("pandas", "matplotlib", "scikit-learn", "sympy", "networkx", "statsmodels", "scikit-image"),
    ),
  ),
  model=dataclasses.replace(settings.model, start_layers=(0, 1, 2), teacher_start="runs/encoder"),
  interaction=dataclasses.replace(
    settings.interaction, steps=160, temperature=temperature, optimizer=Optimizer(learning_rate=4e-4)
  ),
  warmup=Train(
    steps=800, batch=16, negatives=3, weights=Weights.only(nll_ce=1), optimizer=Optimizer(learning_rate=1e-4)
  ),
  cascade=dataclasses.replace(
    settings.cascade,
    steps=100,
    batch=16,
    negatives=7,
    hardest=10,
    weights=Weights(
      dualreg_query=0, dualreg_passage=0, nll_li=0.4, kl_ce_li=0.6, kl_li_de=0.3, kl_ce_de=3, kl_attention=0.01
    ),
    temperature=calibrated,
    late_pool="global",
    optimizer=Optimizer(learning_rate=7e-5, teacher_learning_rate=2e-5),
  ),
  evaluate=Evaluate(late_depth=100, cross_depth=20, teacher_queries=400),
)
