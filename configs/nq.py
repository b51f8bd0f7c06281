"""Natural Questions with ERNIE 2.0, as DPR prepared it: a base student, a large cross-encoder, all seven terms.

  ernie-jax plan configs/nq.py --topology v5e:16x16
  ernie-jax run configs/nq.py --output runs/nq

DPR's files (biencoder-nq-*.json, psgs_w100.tsv) lie in data/nq; `ernie-jax data dpr --from data/nq` prepares and shows
them. Titles are parts of their own, as in RocketQA, whose published rates these are. Never run: time, memory and
quality are unmeasured.
"""

import dataclasses

import msmarco

from ernie_jax.config import Data

config = dataclasses.replace(
  msmarco.config,
  data=Data(name="dpr", folder="data/nq", query_length=32, passage_length=128, template="rocketqa"),
  interaction=dataclasses.replace(msmarco.config.interaction, steps=300, batch=2048),  # about 10 epochs of 59 thousand
  cascade=dataclasses.replace(msmarco.config.cascade, steps=300, batch=2048),
)
