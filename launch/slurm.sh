#!/usr/bin/env bash
# Site defaults for `scmdm launch slurm`: copy this file, edit the options, and call it instead of the command.
# Options given on the command line take precedence.
#
#   launch/slurm.sh adapt configs/qm9/adapt.yaml base=runs/qm9-base run_dir=runs/qm9-scmdm --nodes 2
#
set -euo pipefail
SCMDM=${SCMDM:-.venv/bin/scmdm}
site=(
  --gpus-per-node 8
  --cpus-per-rank 8
  --time 24:00:00
  --signal-before 180 # twice what a save takes: `checkpoint_s` in metrics.jsonl
  # --partition gpu --account ME
  # --setup 'module load cuda'
  # --container-image IMAGE --container-runtime apptainer
)
command=() options=()
for argument in "$@"; do
  if [[ ${#options[@]} -eq 0 && $argument != --* ]]; then command+=("$argument"); else options+=("$argument"); fi
done
exec "$SCMDM" launch slurm "${command[@]}" "${site[@]}" "${options[@]}"
