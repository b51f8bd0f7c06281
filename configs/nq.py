"""Natural Questions with ERNIE 2.0, as DPR prepared it: a base student, a large cross-encoder, all seven terms, DualReg.

  ernie-jax plan configs/nq.py --topology v5e:16x16
  ernie-jax run configs/nq.py --output runs/nq

DPR's files (biencoder-nq-*.json, psgs_w100.tsv) lie in data/nq; `ernie-jax data dpr --from data/nq` prepares and shows
them. Lengths and rates are RocketQA's published ones. Never run here: time, memory and quality are unmeasured.
"""

import dataclasses

from configs.msmarco import config as msmarco
