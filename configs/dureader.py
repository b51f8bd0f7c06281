"""DuReader-retrieval, Chinese, with ERNIE 1.0: a base student, a cross-encoder of the same size, all seven terms.

  ernie-jax plan configs/dureader.py --topology v5e:16x16
  ernie-jax run configs/dureader.py --output runs/dureader

The files of its baseline lie in data/dureader; `ernie-jax data dureader --from data/dureader` prepares and shows them.
Lengths are the baseline's (32 and 384). Never run: time, memory and quality are unmeasured.
"""

import dataclasses

import msmarco

from ernie_jax.config import Architecture, Data

base = Architecture(
  vocabulary=18000, width=768, layers=12, heads=12, inner=3072, positions=513, types=2, activation="relu"
)

config = dataclasses.replace(
  msmarco.config,
  data=Data(name="dureader", folder="data/dureader", query_length=32, passage_length=384),
  model=dataclasses.replace(
    msmarco.config.model,
    start="nghuyong/ernie-1.0-base-zh",
    scratch=base,
    teacher_start="nghuyong/ernie-1.0-base-zh",
    teacher_scratch=base,
  ),
  interaction=dataclasses.replace(msmarco.config.interaction, steps=420, batch=2048),  # 10 epochs of 86 thousand
  cascade=dataclasses.replace(msmarco.config.cascade, steps=420, batch=2048),
)
