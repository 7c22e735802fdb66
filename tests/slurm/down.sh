#!/usr/bin/env bash
# Stops what up.sh DIR started, jobs first, and waits until it is gone.
set -u
dir=$(cd "${1:?usage: down.sh DIR}" && pwd)
export SLURM_CONF=$dir/slurm.conf
timeout 5 scancel --signal=KILL --user="$(id -un)" 2>/dev/null
timeout 5 scancel --user="$(id -un)" 2>/dev/null
for _ in $(seq 50); do
  [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break
  sleep 0.5
done
for file in "$dir"/run/slurmd-*.pid "$dir"/run/slurmctld.pid "$dir"/run/munged.pid; do
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null
  for _ in $(seq 50); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
done
exit 0
