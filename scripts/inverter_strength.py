"""How strong the black-box inverter is: beside two published designs on the same pairs, and beside itself doubled.

    python scripts/inverter_strength.py MODEL DATA [--cut 4] [--budget standard] [--designs ours,doubled,...]

MODEL is a folder with `model.json` and `model.safetensors`, DATA one of CIFAR-10. The adversary owns records of the
training part; the 256 targets and 1,000 candidates are of the test part. The published designs have the budget's width,
steps, records and batches, and their papers' squared error. Prints a line as each is done, then a table, then JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from caltrain.exposure.attacks.decoder import DOSOVITSKIY_BROX, HE_ET_AL, OURS
from caltrain.exposure.attacks.inverter import BUDGETS, InverterBudget, seen, train_inverter
from caltrain.exposure.attacks.shadow import ShadowBudget, shadow
from caltrain.exposure.material import Material, gather
from caltrain.exposure.measures import psnr, reidentify, ssim
from caltrain.exposure.open_model import open_subject
from caltrain.exposure.subject import Cut
from caltrain.records.readers.named import load

TARGETS, CANDIDATES = 256, 1000
DESIGNS = {"He et al.": HE_ET_AL, "Dosovitskiy and Brox": DOSOVITSKIY_BROX, "ours": OURS, "ours doubled": OURS}
Row = dict[str, float | str | dict[str, int]]


def main() -> int:
    """Attack, score, print."""
    asked = _arguments()
    torch.set_num_threads(asked.threads)
    split = load("cifar10", asked.data, download=False)
    train, test = ((torch.from_numpy(part.images), torch.from_numpy(part.labels)) for part in (split.train, split.test))
    subject = open_subject(asked.model)
    material = gather(
        subject, train, test, targets=TARGETS, candidates=CANDIDATES, most_own=asked.records, seed=asked.seed
    )
    cut = Cut(subject, asked.cut)
    budget = replace(BUDGETS[asked.budget], records=asked.records)
    if asked.steps is not None:
        budget = replace(budget, steps=asked.steps)
    rows = [_row("mean image", material.own.mean(0, keepdim=True).expand(TARGETS, -1, -1, -1), material, 0.0)]
    for name in asked.designs.split(","):
        began = time.process_time()
        found, spent = _attack(name, cut, material, budget, seed=asked.seed)
        rows.append(_row(name, found, material, time.process_time() - began) | {"budget": spent})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(f"Cut {asked.cut}, {len(material.own)} own records, {budget.steps} steps of {budget.batch}\n")
    print("| | SSIM | PSNR, dB | re-identified of 1,000 | CPU s |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['ssim']:.3f} | {row['psnr']:.2f} | {row['found']:.1%} | {row['cpu_s']:.0f} |")
    print("\n" + json.dumps({"cut": asked.cut, "budget": asdict(budget), "seed": asked.seed, "rows": rows}))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cut", type=int, default=4)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--budget", choices=BUDGETS, default="standard")
    parser.add_argument("--steps", type=int, help="instead of the budget's")
    parser.add_argument("--designs", default=",".join(DESIGNS), help="also: shadow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _attack(
    name: str, cut: Cut, material: Material, budget: InverterBudget, *, seed: int
) -> tuple[Tensor, dict[str, int]]:
    """Reconstructions, and what was spent on them."""
    if name == "shadow":
        return shadow(cut, material, budget=ShadowBudget(steps=budget.steps, inverter=budget), seed=seed), asdict(
            budget
        )
    spent = budget.doubled() if name == "ours doubled" else budget
    inverter = train_inverter(cut.stacked, material.own, budget=spent, seed=seed, design=DESIGNS[name])
    return inverter(seen(cut, material.targets)), asdict(spent)


def _row(name: str, found: Tensor, material: Material, seconds: float) -> Row:
    return {
        "name": name,
        "ssim": float(ssim(found, material.targets).mean()),
        "psnr": float(psnr(found, material.targets).mean()),
        "found": float(reidentify(found, material.candidates).float().mean()),
        "cpu_s": seconds,
    }


if __name__ == "__main__":
    raise SystemExit(main())
