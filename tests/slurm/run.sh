#!/usr/bin/env bash
# The demo's grid on a real Slurm, with jobs killed in four ways on the way, then one job by two processes, cancelled as well: all resume
# and end with the bytes of jobs that were never killed.
#   tests/slurm/run.sh [PYTHON]
# PYTHON (default: python) has mimlab's packages and snakemake-executor-plugin-slurm. On a machine that has other work:
#   CLUSTER_CPUS=1 nice tests/slurm/run.sh     one job at a time, behind everything else
# Needs slurmctld, slurmd and munged; starts its own, works on a copy of the project in a folder of its own and removes both. Not part of
# `make test`.
set -euo pipefail
python=$(command -v "${1:-python}")
here=$(cd "$(dirname "$0")" && pwd)
. "$here/cluster.sh"
for needed in slurmctld slurmd munged; do
  command -v $needed > /dev/null || { echo "skipped: there is no $needed here (Debian: apt-get install slurm-wlm munge)"; exit 0; }
done
"$python" -c 'import snakemake_executor_plugin_slurm' || { echo "skipped: $python lacks snakemake-executor-plugin-slurm"; exit 0; }

place=$(mktemp -d)
children=()
finish() {
  [ ${#children[@]} = 0 ] || kill "${children[@]}" 2> /dev/null || true
  stop_cluster
  if [ "${passed:-}" ]; then rm -rf "$place"; else echo "failed; logs are in $place"; fi
}
trap finish EXIT
export OMP_NUM_THREADS=1 MIMLAB_TRACKING=off

mkdir "$place/lab" && cd "$place/lab"
cp -r "$here/../../"{Snakefile,profiles,stages,workflow} .
cp "$here/params.yaml" .
start_cluster "$place/cluster"
sinfo

say() { echo "$(date +%T) $*"; }

work_of() { # JOB: where its checkpoints lie
  "$python" -c 'import sys; from workflow.plan import load; print("work/" + load().jobs[sys.argv[1]].fingerprint)' "$1"
}

slurm_job() { # JOB: number of the running Slurm job of a job such as pretrain/mae-s0
  squeue -h -t RUNNING -o '%i %k' | awk -v name="rule_${1%%/*}_wildcards_${1##*/}" '$2 == name { print $1 }'
}

once_training() { # FOLDER JOB COMMAND...: run the command with the Slurm job's number once the job has a checkpoint in FOLDER/work
  local job=$2 folder id
  folder=$1/$(work_of "$2")
  shift 2
  until compgen -G "$folder/*checkpoint*" > /dev/null && id=$(slurm_job "$job") && [ "$id" ]; do sleep 0.3; done
  "$@" "$id"
  say "$job, Slurm job $id: $*"
}

preempt() { sbatch --parsable --partition urgent --cpus-per-task "${CLUSTER_CPUS:-2}" --mem 100 --output /dev/null --wrap 'sleep 5' > /dev/null; }
murder() { kill -KILL $(scontrol listpids "$1" | awk 'NR > 1 && $1 > 0 { print $1 }'); } # as for lack of memory
overrun() { scontrol update "JobId=$1" TimeLimit=1 && scancel --signal STOP "$1"; } # asleep until its minute is over

pair() { # cancel a job after a look at the processes of its allocation: torchrun's two are among them
  local pids ranks
  pids=$(scontrol listpids "$1" | awk 'NR > 1 && $1 > 0 { print $1 }')
  ranks=$(for pid in $pids; do tr '\0' '\n' < "/proc/$pid/environ" | grep '^LOCAL_RANK=' || true; done | sort | xargs)
  [ "$ranks" = "LOCAL_RANK=0 LOCAL_RANK=1" ] || { echo "the processes of $1 are: $ranks" >&2; return 1; }
  scancel "$1"
}

slurm() { # GPUS ARGUMENT...: snakemake through the profile, with as many pretended GPUs for a pretraining
  "$python" -m snakemake --profile profiles/slurm \
    --slurm-status-command squeue --slurm-no-account --slurm-init-seconds-before-status-checks 5 \
    --set-threads data=1 target=1 pretrain=1 transfer=1 \
    --set-resources {data,target,pretrain,transfer,report}:mem_mb=2000 "pretrain:gpu=$1" \
    "${@:2}" >> "$place/snakemake.log" 2>&1 || { tail -n 40 "$place/snakemake.log"; return 1; }
}

resumed() { grep -H 'continuing at step' "$1" || { echo "did not resume: $1"; cat "$1"; return 1; }; }

once_training . target/teacher preempt & children+=($!)
once_training . pretrain/mae-s0 scancel & children+=($!)
once_training . pretrain/supervised-s0 murder & children+=($!)
once_training . pretrain/beitv2-s0 overrun & children+=($!)
slurm 1 --config dvc=false
wait "${children[@]}"

say "the grid is done; every killed job has resumed:"
for job in target/teacher pretrain/{mae,supervised,beitv2}-s0; do resumed "logs/$job.log"; done
"$python" -m workflow.plan | tail -n 3
[ "$("$python" -m snakemake -n 2>&1 | grep -c 'Nothing to be done')" = 1 ]

say "without Slurm, never killed, the same bytes:"
"$python" -m snakemake --cores 1 --config params=params.yaml results=other/results dvc=false -- \
  other/results/pretrain/{mae,supervised,beitv2,random}-s0/manifest.json > "$place/other.log" 2>&1 || { tail -n 40 "$place/other.log"; exit 1; }
for part in data target pretrain; do diff -r results/$part other/results/$part --exclude manifest.json; done

say "two processes in one allocation, cancelled and resumed:"
sed 's/^compute: {/&processes: 2, /' params.yaml > two.yaml
mkdir -p {two,pair}/results && cp -r results/data two/results/ && cp -r results/data pair/results/
once_training two pretrain/mae-s0 pair & children=($!)
slurm 2 --config params=two.yaml results=two/results dvc=false -- two/results/pretrain/mae-s0/manifest.json
wait "${children[@]}"
resumed two/logs/pretrain/mae-s0.log

say "the same bytes as by hand, never killed:"
"$(dirname "$python")/torchrun" --standalone --nproc-per-node 2 -m -- stages.pretrain --run mae-s0 --params two.yaml --results pair/results
diff -r {two,pair}/results/pretrain/mae-s0 --exclude manifest.json
passed=yes
say "passed"
