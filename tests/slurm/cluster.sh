# A Slurm of one node on the loopback address, for this user, in a folder of its own; source it.
#   start_cluster FOLDER    munge, slurmctld and slurmd with two CPUs (or CLUSTER_CPUS) and two pretended GPUs; exports SLURM_CONF
#   stop_cluster            cancels every job and ends what start_cluster started
# Needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge). No accounting database, no systemd, ports of its own.

start_cluster() {
  CLUSTER=$1
  local me node munge="$1/munge"
  me=$(id -un) node=$(hostname -s)
  mkdir -p "$CLUSTER"/{state,spool} && mkdir -m 711 "$munge"
  dd if=/dev/urandom of="$munge/key" bs=128 count=1 status=none && chmod 600 "$munge/key"
  munged --force --key-file "$munge/key" --socket "$munge/socket" --pid-file "$munge/pid" --log-file "$munge/log" \
    --seed-file "$munge/seed"
  munge --socket "$munge/socket" -n | unmunge --socket "$munge/socket" > /dev/null

  cat > "$CLUSTER/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=${SLURMCTLD_PORT:-26817}
SlurmdPort=${SLURMD_PORT:-26818}
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$munge/socket
CredType=cred/munge
StateSaveLocation=$CLUSTER/state
SlurmdSpoolDir=$CLUSTER/spool
SlurmctldPidFile=$CLUSTER/slurmctld.pid
SlurmdPidFile=$CLUSTER/slurmd.pid
SlurmctldLogFile=$CLUSTER/slurmctld.log
SlurmdLogFile=$CLUSTER/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=${CLUSTER_CPUS:-2} RealMemory=64000 Gres=gpu:2
PartitionName=work Nodes=$node Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=$node PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
  printf 'Name=gpu File=/dev/tty1\nName=gpu File=/dev/tty2\n' > "$CLUSTER/gres.conf"   # any two device files do
  # The jobs of Snakemake's plugin call srun without any SLURM_ variable, as a cluster has its slurm.conf in /etc.
  mkdir "$CLUSTER/bin"
  printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$CLUSTER/slurm.conf" "$(command -v srun)" > "$CLUSTER/bin/srun"
  chmod +x "$CLUSTER/bin/srun"
  export SLURM_CONF="$CLUSTER/slurm.conf" PATH="$CLUSTER/bin:$PATH"
  slurmctld && slurmd
  for _ in $(seq 60); do
    [ "$(sinfo -h -o %T 2> /dev/null | sort -u)" = idle ] && return
    sleep 1
  done
  tail -n 20 "$CLUSTER"/slurm*.log >&2
  echo "the node did not become idle in a minute" >&2
  return 1
}

stop_cluster() {
  [ -n "${CLUSTER:-}" ] || return 0
  scancel --user "$(id -un)" --signal KILL 2> /dev/null || true
  sleep 1
  local file pid
  for file in slurmd.pid slurmctld.pid munge/pid; do
    [ -s "$CLUSTER/$file" ] && pid=$(cat "$CLUSTER/$file") && kill "$pid" 2> /dev/null || continue
    for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2> /dev/null && sleep 0.5 || break; done
    kill -KILL "$pid" 2> /dev/null || true
  done
}
