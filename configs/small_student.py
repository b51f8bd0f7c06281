"""A small student under a larger teacher: the first three layers of all-MiniLM-L6-v2 learn from a cross-encoder of six.

  ernie-jax run configs/quickstart.py --output runs/quickstart       (its encoder is where the cross-encoder starts)
  ernie-jax ablate configs/small_student.py --output runs/small_student

Unmeasured as a whole. Layers that were cut off are soon made up for at four times the quickstart's learning rate; the
cascade's small batches bear an eighth of that, and the cross-encoder has a rate of its own.
"""

import dataclasses

import quickstart

from ernie_jax.config import Evaluate, Optimizer, Temperatures, Train, Weights

settings = quickstart.config
temperature = Temperatures(dual=0.02, late=0.25, cross=1.0, attention=0.1)

config = dataclasses.replace(
  settings,
  model=dataclasses.replace(settings.model, start_layers=(0, 1, 2), teacher_start="runs/quickstart"),
  interaction=dataclasses.replace(
    settings.interaction, steps=264, temperature=temperature, optimizer=Optimizer(learning_rate=4e-4)
  ),
  warmup=Train(
    steps=1200, batch=8, negatives=3, weights=Weights.only(nll_ce=1), optimizer=Optimizer(learning_rate=1e-4)
  ),
  cascade=dataclasses.replace(
    settings.cascade,
    steps=100,
    temperature=temperature,
    late_pool="global",
    residual=True,
    optimizer=Optimizer(learning_rate=5e-5, teacher_learning_rate=2e-5),
  ),
  evaluate=Evaluate(late_depth=100, cross_depth=20, teacher_queries=329),
)
