"""The docstrings of installed packages at full quality: epochs, not minutes.

  ernie-jax run configs/docstrings.py --output runs/docstrings

Unmeasured: hours on a CPU.
"""

import dataclasses

import quickstart

from ernie_jax.config import Data, Optimizer

settings = quickstart.config

config = dataclasses.replace(
  settings,
  data=Data(query_length=32, passage_length=128),
  interaction=dataclasses.replace(settings.interaction, steps=440),  # 5 epochs
  warmup=dataclasses.replace(settings.warmup, steps=1400, optimizer=Optimizer(learning_rate=5e-5)),  # 2 epochs
  cascade=dataclasses.replace(settings.cascade, steps=1400),
)
