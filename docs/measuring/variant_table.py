"""A Markdown table of what `transfer_variants.py` measured: tokens per step by rows, and what a pseudo row costs.

python docs/measuring/variant_table.py MODEL RESULTS.json [RESULTS.json ...]

The cost is that of the products of a pseudo row, which are nearly all of its time on a CPU, as a share of those of a
row of the base model: the layers passed, the LM head, and what the variant adds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn
from variant_drafts import ROWS

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.model.families import decoder_parts
from ht_export.model.transfer import default_layers


def linear_sizes(base: BaseModel, first: int) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of all linear maps of the layers from `first` on."""
    layers = decoder_parts(base.model).layers[first:]
    found = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    return [(module.in_features, module.out_features) for module in found]


def pseudo_row_cost(base: BaseModel, variant: dict[str, Any], correction_rank: int) -> float:
    """Return the products of a pseudo row over those of a row of the base model."""
    width = base.model.config.hidden_size
    head = base.model.config.vocab_size * width
    whole = head + sum(given * made for given, made in linear_sizes(base, 0))
    passed = linear_sizes(base, default_layers(base.model.config.num_hidden_layers)[0])
    own = head + width * width + sum(given * made for given, made in passed)
    if variant["gated"]:
        own += width * correction_rank
    if variant["rank"]:
        own += sum(variant["rank"] * (given + made) for given, made in passed)
    return own / whole


def rows_of(base: BaseModel, record: dict[str, Any], correction_rank: int) -> list[str]:
    """Return the table's lines of one run, the best at 16 rows first."""
    last = record["measured"][-1]
    found = last["held_out"]
    lines = []
    for name in sorted(found, key=lambda one: -found[one]["tokens_per_step"]["16"]):
        one, variant = found[name], record["variants"][name]
        top = " ".join(f"{share:.3f}"[1:] for share in one["top"]["1"])
        tokens = " | ".join(f"{one['tokens_per_step'][str(rows)]:.2f}" for rows in ROWS)
        cost = pseudo_row_cost(base, variant, correction_rank)
        lines.append(f"| {name} | {last['step']} | {top} | {one['log_loss'][0]:.3f} | {tokens} | {cost:.3f} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--correction-rank", type=int, default=128)
    options = parser.parse_args()
    base = load_base_model(options.model)
    columns = " | ".join(f"{rows} rows" for rows in ROWS)
    print(f"| variant | steps | top-1 by step | loss of step 1 | {columns} | products of a pseudo row |")
    print("| --- | ---: | --- | ---: |" + " ---: |" * (len(ROWS) + 1))
    for path in options.results:
        print("\n".join(rows_of(base, json.loads(path.read_text()), options.correction_rank)))


if __name__ == "__main__":
    main()
