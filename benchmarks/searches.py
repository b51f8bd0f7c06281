"""Ten searches that a user would type, with their top 3, as a Markdown table.

python benchmarks/searches.py runs/quickstart
"""

import sys
import textwrap
from pathlib import Path

from ernie_jax.search import Searcher

QUERIES = (
  "how do I pad an array with zeros",
  "run a function in another thread and get its result later",
  "read a csv file",
  "solve a system of linear equations",
  "vectorize a function over a batch dimension",
  "parse a date string",
  "adam optimizer with weight decay",
  "fourier transform of a real signal",
  "temporary directory that is deleted afterwards",
  "dropout layer",
)

search = Searcher(Path(sys.argv[1]))
print("| query | 1 | 2 | 3 |\n|---|---|---|---|")
for query, hits in zip(QUERIES, search.search(QUERIES, 3)):
  found = (f"`{hit.title}` {hit.score:.2f} <br> {textwrap.shorten(hit.text, 60, placeholder=' …')}" for hit in hits)
  print(f"| {query} | " + " | ".join(text.replace("|", "\\|") for text in found) + " |")
