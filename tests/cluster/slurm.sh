#!/usr/bin/env bash
# A real SLURM on this one machine, for tests: `slurm.sh up`, `slurm.sh down`, `slurm.sh env`.
#
# `up` installs the Debian packages slurm-wlm and munge where they are missing, configures and starts munged, slurmctld
# and one slurmd for each node, and waits until a job has run. `down` stops what `up` started, and nothing else. Both may be
# repeated. `env` prints the variables that make a shell use this SLURM: eval "$(tests/cluster/slurm.sh env)".
# As root, or through sudo where that asks for no password. All files are below SLURM_TEST_DIR, but for the link
# /etc/slurm/slurm.conf, which is made where that name is free: job steps of Snakemake do not pass SLURM_CONF on.
#
#   SLURM_TEST_DIR    folder of everything                    /tmp/lenspipe-slurm-<user>
#   SLURM_TEST_NODES  nodes, all of them this machine         2
#   SLURM_TEST_CPUS   processors of each, real or not         8
#   SLURM_TEST_MEM    memory of each [MB], there or not       16000
#   SLURM_TEST_GPUS   GPUs of each, copies of /dev/null       2
#   SLURM_TEST_PORT   of slurmctld; the nodes take the next   17000
set -euo pipefail

folder=${SLURM_TEST_DIR:-/tmp/lenspipe-slurm-${SUDO_USER:-$(id -un)}}
nodes=${SLURM_TEST_NODES:-2}
cpus=${SLURM_TEST_CPUS:-8}
memory=${SLURM_TEST_MEM:-16000}
gpus=${SLURM_TEST_GPUS:-2}
port=${SLURM_TEST_PORT:-17000}
link=/etc/slurm/slurm.conf

say() { echo "slurm.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

# alive PIDFILE WORD: the process number in PIDFILE, if such a process lives and WORD is in its command line
alive() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -- "$2" && echo "$pid"
}

# wait_for SECONDS COMMAND...: until the command succeeds
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.1
  done
}

as_root() {
  [ "$(id -u)" = 0 ] && return
  command -v sudo >/dev/null || fail "needs root: slurmd starts jobs as the user who submits them; there is no sudo here"
  sudo -n true 2>/dev/null || fail "needs root: slurmd starts jobs as the user who submits them; sudo asks for a password"
  exec sudo -n --preserve-env=SLURM_TEST_NODES,SLURM_TEST_CPUS,SLURM_TEST_MEM,SLURM_TEST_GPUS,SLURM_TEST_PORT \
    SLURM_TEST_DIR="$folder" bash "$0" "$1"
}

install_packages() {
  local missing=()
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || missing+=(slurm-wlm)
  command -v munged >/dev/null || missing+=(munge)
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "needs ${missing[*]}, and there is no apt-get here to install them with"
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update >"$folder/log/apt.log" 2>&1 || say "apt-get update failed; trying with the lists there are"
  apt-get -qq install -y --no-install-recommends "${missing[@]}" >>"$folder/log/apt.log" 2>&1 \
    || fail "cannot install ${missing[*]}: $(tail -n 3 "$folder/log/apt.log" | tr '\n' ' ')"
}

# Own key and socket, so that a munged of the system is left alone
start_munged() {
  [ -s "$folder/etc/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/etc/munge.key")
  if ! alive "$folder/run/munged.pid" munged >/dev/null; then
    rm -f "$folder"/run/munge*
    munged --num-threads=2 --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.socket" \
      --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed"
  fi
  wait_for 10 sh -c "munge -S '$folder/run/munge.socket' -n | unmunge -S '$folder/run/munge.socket'" \
    || fail "munged does not answer: $(tail -n 2 "$folder/log/munged.log")"
}

write_configuration() {
  local host gres="" number
  host=$(hostname -s)
  : >"$folder/etc/gres.conf"
  if [ "$gpus" -gt 0 ]; then
    for number in $(seq 0 $((gpus - 1))); do
      [ -c "$folder/dev/nvidia$number" ] || mknod -m 666 "$folder/dev/nvidia$number" c 1 3
    done
    echo "NodeName=node[1-$nodes] Name=gpu File=$folder/dev/nvidia[0-$((gpus - 1))]" >"$folder/etc/gres.conf"
    gres="Gres=gpu:$gpus"
  fi
  cat <<CONF
ClusterName=lenspipe
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
# without cgroups, so that it runs in containers too
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
# nodes may have more processors than the machine
SlurmdParameters=config_overrides
DefMemPerCPU=500
# jobs that have ended are shown for so long [s]: squeue is all that Snakemake can ask where nothing is accounted
MinJobAge=600
KillWait=3
SlurmctldTimeout=30
# a busy machine may stop a daemon for long; tests that lose a node set it down themselves
SlurmdTimeout=120
ReturnToService=2
SchedulerParameters=bf_interval=2,sched_min_interval=100000
PriorityType=priority/basic
CONF
  for number in $(seq 1 "$nodes"); do
    echo "NodeName=node$number NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + number)) CPUs=$cpus" \
      "RealMemory=$memory $gres State=UNKNOWN"
  done
  echo "PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
  echo "PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP"
}

link_configuration() {
  if [ ! -e "$link" ] && [ ! -L "$link" ] || [ "$(readlink "$link")" = "$folder/etc/slurm.conf" ]; then
    mkdir -p /etc/slurm
    ln -sfn "$folder/etc/slurm.conf" "$link"
  else
    say "note: $link is another cluster's; Snakemake's job steps will talk to that one"
  fi
}

up() {
  mkdir -p "$folder"/{etc,log,run,state,spool,dev}
  chmod 755 "$folder" "$folder"/{etc,log,run,state,spool,dev} # whoever submits jobs reads the configuration
  install_packages
  start_munged
  write_configuration >"$folder/etc/slurm.conf.new"
  export SLURM_CONF="$folder/etc/slurm.conf"
  if alive "$folder/run/slurmctld.pid" slurmctld >/dev/null && ! cmp -s "$SLURM_CONF.new" "$SLURM_CONF"; then
    fail "is up with another configuration; run \`$0 down\` first"
  fi
  mv "$SLURM_CONF.new" "$SLURM_CONF"
  chmod 644 "$SLURM_CONF"
  link_configuration
  alive "$folder/run/slurmctld.pid" slurmctld >/dev/null || { rm -f "$folder/run/slurmctld.pid" && slurmctld; }
  local number
  for number in $(seq 1 "$nodes"); do
    mkdir -p "$folder/spool/node$number"
    alive "$folder/run/slurmd-node$number.pid" "slurmd.*-N node$number" >/dev/null \
      || { rm -f "$folder/run/slurmd-node$number.pid" && slurmd -N "node$number"; }
  done
  wait_for 30 sh -c "[ \"\$(sinfo -h -N -p cpu -t idle,mix,alloc -o %N | wc -l)\" -ge $nodes ]" \
    || fail "nodes do not come up; see $folder/log"
  wait_for 30 srun -p cpu --mem=10 -t 1 true || fail "no job runs; see $folder/log"
  say "up: $nodes nodes of $cpus processors, $memory MB and $gpus GPUs that are none; partitions cpu, gpu"
}

# stop PIDFILE WORD: end the process that a daemon's file names
stop() {
  local pid
  pid=$(alive "$1" "$2") || return 0
  kill "$pid" 2>/dev/null || return 0
  wait_for 10 sh -c "! kill -0 $pid" || kill -9 "$pid"
}

# Steps whose slurmd was killed live on; ours have our configuration in their environment
stop_orphans() {
  local step pid child
  for step in /proc/[0-9]*/comm; do
    [ "$(cat "$step" 2>/dev/null)" = slurmstepd ] || continue
    pid=${step#/proc/} pid=${pid%/comm}
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qx "SLURM_CONF=$folder/etc/slurm.conf" || continue
    for child in $(ps -o pid= --ppid "$pid"); do
      kill -9 -- "-$(ps -o pgid= -p "$child" | tr -d ' ')" 2>/dev/null || kill -9 "$child" 2>/dev/null || true
    done
    kill -9 "$pid" 2>/dev/null || true
  done
}

down() {
  [ -d "$folder/run" ] || { say "nothing in $folder"; return; }
  export SLURM_CONF="$folder/etc/slurm.conf"
  if alive "$folder/run/slurmctld.pid" slurmctld >/dev/null; then
    local state
    for state in PENDING RUNNING SUSPENDED; do timeout 10 scancel --state=$state >/dev/null 2>&1 || true; done
    wait_for 5 sh -c '[ -z "$(squeue -h -t R,CG)" ]' || true
  fi
  local file
  for file in "$folder"/run/slurmd-*.pid; do stop "$file" slurmd; done
  stop "$folder/run/slurmctld.pid" slurmctld
  stop "$folder/run/munged.pid" munged
  stop_orphans
  if [ "$(readlink "$link")" = "$folder/etc/slurm.conf" ]; then rm -f "$link"; fi
  rm -rf "${folder:?}"/{state,spool}
  say "down"
}

case "${1:-}" in
  up | down) as_root "$1"; "$1" ;;
  env) echo "export SLURM_CONF=$folder/etc/slurm.conf" ;;
  *) fail "usage: $0 up | down | env" ;;
esac
