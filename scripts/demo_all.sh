#!/usr/bin/env bash
# The demo on every data set, one after the other, held against what is promised.
#
#   scripts/demo_all.sh DATA_DIR [OUT]
#
# DATA_DIR holds mnist, cifar10 and pneumoniamnist (digits need none). Some minutes on two cores. The figures of the
# last two are whatever they are; of each set weights must be identical and all disclosures verified. Exit status 1 if
# a promise is missed. Prints one JSON object for each set.
set -euo pipefail

data_dir=${1:?usage: scripts/demo_all.sh DATA_DIR [OUT]}
out=${2:-caltrain-demo}
python=$(dirname "$0")/../.venv/bin/python
failed=0

for data in digits mnist pneumoniamnist cifar10; do
  result=$("$python" -m caltrain demo --data "$data" --data-dir "$data_dir" --out "$out" --format json) || {
    echo "$result"
    failed=1
    continue
  }
  echo "$result"
  "$python" - "$data" "$result" <<'PY' || failed=1
import json
import sys

data, found = sys.argv[1], json.loads(sys.argv[2])
missed = [name for name in ("weights_identical", "simulated") if not found[name]]
missed += ["plain_accuracy"] * (found["accuracy"] != found["plain_accuracy"])
missed += ["disclosures_verified"] * (found["disclosures_verified"] != found["disclosures"])
missed += ["substitutions_refused"] * (found["substitutions_refused"] != found["substitutions"])
if data in ("digits", "mnist"):
    least = {
        "accuracy": 0.97 if data == "mnist" else 0.95,
        "attack_success": 0.9,
        "triggered_inputs": 200,
        "trace_precision_at_9": 0.95,
        "trace_contributor_accuracy": 0.99,
        "mislabel_auroc": 0.9,
    }
    missed += [name for name, figure in least.items() if found[name] < figure]
    missed += ["poison_share"] * (found["poison_share"] > 0.02)
if missed:
    sys.exit(f"{data}: missed {', '.join(missed)}")
PY
done
exit "$failed"
