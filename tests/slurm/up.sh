#!/usr/bin/env bash
# A real SLURM of several "nodes" on this one machine, from Debian's packages (slurm-wlm, munge): slurmctld and one slurmd
# per node on loopback. Usage: up.sh DIR [NODES [PORT]]. Leaves SLURM_CONF to export in DIR/env; down.sh DIR stops it.
# Exit status 77: the packages cannot be installed. For tests only: runs as root, jobs are not confined.
set -euo pipefail
dir=$(mkdir -p "${1:?usage: up.sh DIR [NODES [PORT]]}" && cd "$1" && pwd) nodes=${2:-2} port=${3:-17400}
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } >"$dir/apt.log" 2>&1 ||
    { tail -n 1 "$dir/apt.log" >&2; exit 77; }
fi
host=$(hostname -s) cpus=$(nproc)
mkdir -p "$dir"/{state,log,run,munge}

# munge: our own key and socket, so that a system's munged is neither needed nor disturbed
[ -s "$dir/munge/key" ] || head -c 1024 /dev/urandom >"$dir/munge/key"
chown -R munge:munge "$dir/munge"; chmod 700 "$dir/munge"; chmod 400 "$dir/munge/key"; chmod 711 "$dir"
socket=$dir/run/munge.socket
chown munge:munge "$dir/run"; chmod 755 "$dir/run"
pgrep -F "$dir/run/munged.pid" >/dev/null 2>&1 || setsid runuser -u munge -- /usr/sbin/munged --force \
  --key-file="$dir/munge/key" --socket="$socket" --pid-file="$dir/run/munged.pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"

cat >"$dir/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/state/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
JobRequeue=1
KillWait=20
InactiveLimit=0
SlurmdTimeout=15
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=$cpus RealMemory=4096 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4 PriorityTier=1 GraceTime=40
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
CONF
echo "export SLURM_CONF=$dir/slurm.conf" >"$dir/env"
export SLURM_CONF=$dir/slurm.conf
for _ in $(seq 50); do [ -S "$socket" ] && break; sleep 0.1; done
pgrep -F "$dir/run/slurmctld.pid" >/dev/null 2>&1 || setsid /usr/sbin/slurmctld -f "$SLURM_CONF"
# Each node has its own host name and shared memory, as machines do: what one leaves there must not meet another's.
{ cat /etc/hosts; printf '127.0.0.1 n%s\n' $(seq "$nodes"); } >"$dir/hosts"
for i in $(seq "$nodes"); do
  pgrep -F "$dir/run/slurmd-n$i.pid" >/dev/null 2>&1 || setsid unshare --mount --uts sh -c \
    "mount -t tmpfs tmpfs /dev/shm && mount --bind '$dir/hosts' /etc/hosts && hostname n$i &&
     exec /usr/sbin/slurmd -f '$SLURM_CONF' -N n$i"
done
for _ in $(seq 100); do
  [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" -ge "$nodes" ] && { sinfo; echo "source $dir/env"; exit 0; }
  sleep 0.2
done
echo "SLURM did not come up; see $dir/log" >&2; sinfo -N -o '%N %T %E' >&2 || true; tail -5 "$dir"/log/*.log >&2; exit 1
