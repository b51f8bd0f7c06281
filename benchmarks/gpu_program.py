"""What the training step's program for an NVIDIA GPU multiplies and moves, by source line; compiled without a GPU.

  python benchmarks/gpu_program.py                                            (about a minute each)
  python benchmarks/gpu_program.py --steps cascade --layers 2 --queries 32 --top 20

Needs `pip install -e .[cuda]` and jax 0.11 or later, no GPU. Texts and steps are those of tpu.py. The time is a bound:
of each kernel the longer of its FLOPs at the rate that products reach on an H200 and its bytes at the rate of a copy.
There the cascade took 1.2 times as long as it says: attention and normalisation reach neither rate (RESULTS.md).
"""

import argparse
import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
# Without a GPU no kernel can be tried out, and the compiler would take poor ones for products.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"

import jax
import tpu
from jax.experimental import topologies

from ernie_jax import batches, mesh, plan, step

RATE, BANDWIDTH = 760e12, 4e12  # of an H200: FLOP/s of the step's products in bfloat16, bytes/s read and written
LAUNCH = 1e-6  # seconds
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
}
platform_name: "CUDA" device_description_str: "H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
"""
# Move nothing themselves.
NOTHING = ("parameter", "get-tuple-element", "tuple", "constant", "bitcast", "conditional", "call")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[\w\-]+)\((?P<of>.*?)\)")


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One launch."""

  where: str  # file:line
  flops: float  # of products
  bytes: float  # read and written

  @property
  def seconds(self) -> float:
    return max(self.flops / RATE, self.bytes / BANDWIDTH) + LAUNCH


class Program:
  """The kernels of compiled text."""

  def __init__(self, hlo: str):
    (self.found, self.entry), self.known = plan.computations(hlo), plan.sources(hlo)
    every = (hit for lines in self.found.values() for line in lines if (hit := INSTRUCTION.match(line)))
    self.shapes = {hit["name"]: hit["shape"] for hit in every}

  def kernels(self, name: str | None = None) -> Iterator[Kernel]:
    """From a computation on; of a condition's branches, the longest."""
    for line in self.found[name or self.entry]:
      if (hit := INSTRUCTION.match(line)) is None:
        continue
      if hit["kind"] == "conditional":
        yield from self.kernels(max(plan.branches(line), key=lambda n: len(self.found[n])))
      elif hit["kind"] == "call" and (part := re.search(r"to_apply=%?([\w.\-]+)", line)):
        yield from self.kernels(part[1])
      if hit["kind"] in NOTHING:
        continue
      inner = self.found[called[1]] if (called := re.search(r"calls=%?([\w.\-]+)", line)) else []
      inner = sorted(inner, key=lambda each: " dot(" not in each and " custom-call(" not in each)
      frame = next((f for each in (line, *inner) if (f := re.search(r"stack_frame_id=(\d+)", each))), None)
      moved = plan.size(hit["shape"]) + sum(plan.size(self.shapes.get(of, "")) for of in self.operands(hit))
      yield Kernel(self.known.get(frame[1], "?") if frame else "the compiler", self.flops(line), moved)

  def operands(self, hit: re.Match[str]) -> list[str]:
    return re.findall(r"%([\w.\-]+)", hit["of"])

  def flops(self, line: str) -> float:
    """Of the products that an instruction makes, and those within a fusion."""
    if called := re.search(r"calls=%?([\w.\-]+)", line):
      return sum(map(self.flops, self.found[called[1]]))
    hit = INSTRUCTION.match(line)
    if hit is None or hit["kind"] not in ("dot", "custom-call"):
      return 0
    dims = [[int(n) for n in found.split(",") if n] for found in re.findall(r"\[([\d,]*)\]", hit["shape"])]
    if "fmha" in line:  # [n, heads, length, d]: two products forward, five back
      *all_but, length, d = dims[0]
      return (10 if "Backward" in line else 4) * math.prod(all_but) * length**2 * d
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[\[{]"?([\d,"]*)', line)
    if contracted is None:
      return 0
    left = re.search(r"\[([\d,]*)\]", self.shapes[self.operands(hit)[0]])
    assert left is not None
    sizes = left[1].split(",")
    return 2 * math.prod(dims[0]) * math.prod(int(sizes[int(n)]) for n in re.findall(r"\d+", contracted[1]))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", nargs="+", choices=tpu.STEPS, default=["dual", "cascade"])
  parser.add_argument("--teacher", choices=tpu.TEACHERS, default="base")
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--queries", type=int, default=64, help="of a device")
  parser.add_argument("--passages", type=int, default=8, help="of a query")
  parser.add_argument("--pack", type=int, default=256, help="tokens of a packed row")
  parser.add_argument("--dropout", type=float, default=0.0)
  parser.add_argument("--layers", type=int, help="of every encoder, for a quick look")
  parser.add_argument("--top", type=int, default=0, help="source lines shown of each case")
  chosen = argparse.Namespace(**vars(parser.parse_args()), chunk=None, recompute=True, scan=False, remat=False)
  topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=f"1x1x{chosen.devices}")
  texts, grid = plan.typical(*tpu.TOKENS), mesh.make(topology.devices)
  print("| step | kernels | TFLOP | GB | ms at least | useful TFLOP/s at most | GiB |\n" + "|---" * 7 + "|")
  for name in chosen.steps:
    settings = tpu.configuration(name, chosen.teacher, "packed", chosen, chosen.devices)
    train = getattr(settings, tpu.STEPS[name][0])
    layout = batches.layout(settings.data, train, chosen.devices, texts)
    with jax.set_mesh(grid):
      jitted: Any = step.make_train_step(settings.model, train)
      compiled = jitted.lower(*plan.arguments(settings, train, grid, layout)).compile()
    kernels = list(Program(compiled.as_text()).kernels())
    spent, stats = sum(k.seconds for k in kernels), compiled.memory_analysis()
    useful = tpu.useful(settings, train, texts) / chosen.devices
    print(f"| {name} | {len(kernels)} | {sum(k.flops for k in kernels) / 1e12:.2f} | "
          f"{sum(k.bytes for k in kernels) / 1e9:.1f} | {1e3 * spent:.2f} | {useful / spent / 1e12:.0f} | "
          f"{(stats.temp_size_in_bytes + stats.argument_size_in_bytes) / plan.GIB:.1f} |",
          flush=True)  # fmt: skip
    lines: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
      lines[kernel.where].append(kernel)
    for where, own in sorted(lines.items(), key=lambda item: -sum(k.seconds for k in item[1]))[: chosen.top]:
      time, flops, moved = (sum(getattr(k, of) for k in own) for of in ("seconds", "flops", "bytes"))
      print(f"    {time / spent:6.1%}  {where:24} {len(own):4} kernels {flops / 1e12:7.2f} TFLOP {moved / 1e9:7.1f} GB")


if __name__ == "__main__":
  main()
