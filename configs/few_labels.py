"""small_student.py's student and cross-encoder go on to packages that neither has seen, with 300 labels.

  ernie-jax run configs/small_student.py --cascade.steps 0 --output runs/small_start    (what both begin with; as there)
  pip install --no-deps --target more astropy kornia music21 pennylane pyvista SQLAlchemy        (docstrings are read)
  pip install --no-deps --target more Twisted diffusers Django xarray biopython
  PYTHONPATH=more ernie-jax ablate configs/few_labels.py --output runs/few --rows no_teacher de_only uniform_teacher

Measured on 2 CPU cores, three seeds (RESULTS.md): 0.431 in the dual-encoder and 0.526 in late interaction, 0.03 to 0.07
and 0.01 to 0.02 above the dual-encoder's own loss, no cross-encoder and a uniform one (p < 0.05 each); BM25 has 0.551.
Controls that are stopped in time (`--rows own`) are 0.01 below it in the dual-encoder, alike in late interaction.
A student of six layers, `--model.start runs/quickstart`: not above its own loss by more than chance (RESULTS.md).
`--model.dtype mixed`, which was used, is for a CPU with products of bfloat16.
"""

import dataclasses

import small_student

from ernie_jax.config import Config, Weights

settings = small_student.config

config = dataclasses.replace(
  settings,
  data=dataclasses.replace(
    settings.data,
    packages=(
      *("astropy", "kornia", "music21", "pennylane", "pyvista", "SQLAlchemy"),
      *("Twisted", "diffusers", "Django", "xarray", "biopython"),
    ),
    train_queries=300,
  ),
  model=dataclasses.replace(
    settings.model, start="runs/small_start", start_layers=(), teacher_start="runs/small_start"
  ),
  interaction=dataclasses.replace(settings.interaction, steps=0),
  warmup=dataclasses.replace(settings.warmup, steps=0),
  cascade=dataclasses.replace(
    settings.cascade,
    hardest=None,
    teacher="frozen",  # so few labels would spoil it
    weights=dataclasses.replace(settings.cascade.weights, nll_ce=0, nll_de=0.3, kl_ce_li=1, kl_ce_de=4),
    optimizer=dataclasses.replace(settings.cascade.optimizer, teacher_learning_rate=None),
  ),
)


def stopped(weights: Weights) -> Config:
  """With these weights, and of the student after 25, 50, 75 and 100 steps the one that is best on dev."""
  cascade = dataclasses.replace(config.cascade, weights=weights, measure_every=25)
  return dataclasses.replace(config, cascade=cascade, evaluate=dataclasses.replace(config.evaluate, dev_queries=1000))


full = config.cascade.weights
rows = {  # `--rows own`
  "full_stopped": stopped(full),
  "de_only_stopped": stopped(Weights.only(nll_de=full.nll_de)),
  "no_teacher_stopped": stopped(Weights.only(nll_de=full.nll_de, nll_li=full.nll_li, kl_li_de=full.kl_li_de)),
}
