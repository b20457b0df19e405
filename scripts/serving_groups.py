"""What the host can tell of the answers of a served model, from what it sees.

    python scripts/serving_groups.py MODEL --data NAME --data-dir DIR --cut N --head N [--records 1000]

MODEL is a folder with model.json and model.safetensors, packaged at `--cut`. The host sees the IR of every record and
what its own CenterNet makes of it: the scores (two-way, and mapped, where it does not know which output is which
class), or what goes into the HeadNet (ternary). Printed for each: the share of answers read directly; the purity of
clusters (of the greatest output, where there are scores; else by k-means) and that of clusters drawn at random; and the
share of answers named rightly by who knows one, five or twenty answers of each class. An *answer* is the model's own,
right or wrong: that is what serving hides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from caltrain.exposure.attacks.labels import Groups, Named, in_majority, label_groups, reduced, share_named
from caltrain.exposure.open_data import open_records
from caltrain.exposure.open_model import open_subject
from caltrain.exposure.statistics import mean_estimate, rate_estimate
from caltrain.exposure.subject import Subject
from caltrain.models.network import zone_of

KNOWN = (1, 5, 20)
DRAWS = 20


def seen(subject: Subject, pictures: Tensor, *, cut: int, head: int) -> dict[str, Tensor]:
    """What crosses for these pictures: the IR, the HeadNet's input, the logits."""
    last = len(subject.spec.layers) - head
    zones = [zone_of(subject.module, subject.spec, part) for part in (range(cut), range(cut, last))]
    found: dict[str, list[Tensor]] = {"ir": [], "center-out": [], "logits": []}
    with torch.inference_mode():
        for part in torch.split(pictures, 64):
            ir, _ = zones[0].through((subject.inputs(part),))
            out, _ = zones[1].through(ir)
            found["ir"].append(reduced(ir))
            found["center-out"].append(reduced(out))
            found["logits"].append(subject.logits(part))
    return {name: torch.cat(parts) for name, parts in found.items()}


def by_output(logits: Tensor, answers: np.ndarray[tuple[int], np.dtype[np.int64]], *, seed: int = 0) -> Groups:
    """Groups of the greatest output, whose name the host does not know."""
    order = np.random.default_rng(seed).permutation(logits.shape[1])
    clusters = order[logits.argmax(1).numpy()].astype(np.int64)
    rng = np.random.default_rng(seed)
    named = {k: [share_named(clusters, answers, known=k, rng=rng) for _ in range(DRAWS)] for k in KNOWN}
    return Groups(
        purity=rate_estimate(in_majority(clusters, answers), len(answers)),
        floor=float(np.mean([in_majority(rng.permutation(clusters), answers) for _ in range(DRAWS)])) / len(answers),
        named=tuple(Named(known, mean_estimate(values, seed=seed)) for known, values in named.items()),
    )


def row(form: str, tensor: str, directly: str, groups: Groups) -> str:
    """One line of the table."""
    values = (groups.purity.value, groups.floor, *(named.right.value for named in groups.named))
    return f"| {form} | `{tensor}` | {directly} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cut", type=int, required=True)
    parser.add_argument("--head", type=int, required=True)
    parser.add_argument("--records", type=int, default=1000)
    asked = parser.parse_args()
    subject = open_subject(asked.model)
    _, (elements, _) = open_records(asked.data, subject.data, folder=asked.data_dir)
    pictures = subject.pictures(elements[: asked.records])
    found = seen(subject, pictures, cut=asked.cut, head=asked.head)
    answers = found["logits"].argmax(1).numpy().astype(np.int64)
    classes = found["logits"].shape[1]
    ir = label_groups(found["ir"], answers, classes=classes, known=KNOWN)
    out = label_groups(found["center-out"], answers, classes=classes, known=KNOWN)
    print("| form | what the host sees | read directly | purity | floor | by 1 known | by 5 | by 20 |")
    print("|---|---|---|---|---|---|---|---|")
    print(row("all", "ir", "", ir))
    print(row("two-way", "center-out: scores", "1.000", by_output(found["logits"], answers)))
    print(row("mapped", "center-out: scores, unnamed", f"{1 / classes:.3f}", by_output(found["logits"], answers)))
    print(row(f"ternary, head {asked.head}", "center-out", "", out))


if __name__ == "__main__":
    main()
