"""MS MARCO passages with ERNIE 2.0: a base student, a large cross-encoder, all seven terms and DualReg.

  ernie-jax plan configs/msmarco.py --topology v5e:16x16 --tokens 11 80
  ernie-jax run configs/msmarco.py --output runs/msmarco

Microsoft's files lie in data/msmarco; `ernie-jax data msmarco --from data/msmarco` prepares and shows them.
Lengths and rates (student 3e-5, cross-encoder 1e-5, warm-up of 10 %) are RocketQA's, batches those of a pod. Its
denoising, at most a probability of 0.1, asks for a cross-encoder trained pair by pair; ours learns from lists, where
only differences mean something: what it ranks above the known positive is taken out.
Planned with the compiler, never run: time, memory and quality are unmeasured.
"""

from ernie_jax.config import Architecture, Config, Data, Evaluate, Mine, Model, Optimizer, Train, Weights

base = Architecture(vocabulary=30522, width=768, layers=12, heads=12, inner=3072, positions=512, types=4)
large = Architecture(vocabulary=30522, width=1024, layers=24, heads=16, inner=4096, positions=512, types=4)

config = Config(
  data=Data(name="msmarco", folder="data/msmarco", query_length=32, passage_length=128, pack=128),
  model=Model(
    start="nghuyong/ernie-2.0-base-en",
    scratch=base,  # the two shapes, so that `plan` needs no download
    teacher_start="nghuyong/ernie-2.0-large-en",
    teacher_scratch=large,
    dtype="bfloat16",
    scan=True,
    remat=True,
  ),
  interaction=Train(
    steps=600,  # about 10 epochs of 500 thousand queries
    batch=8192,
    weights=Weights.only(nll_de=1, nll_li=1, kl_li_de=1, dualreg_query=1, dualreg_passage=1),
    late_pool="global",
    optimizer=Optimizer(learning_rate=3e-5),
  ),
  mine=Mine(first=1, last=50, margin=0.0),
  warmup=Train(
    steps=1000, batch=1024, negatives=7, weights=Weights.only(nll_ce=1), optimizer=Optimizer(learning_rate=1e-5)
  ),
  cascade=Train(
    steps=600, batch=8192, negatives=7, optimizer=Optimizer(learning_rate=3e-5, teacher_learning_rate=1e-5)
  ),
  evaluate=Evaluate(late_depth=1000, cross_depth=50),
)
