#!/usr/bin/env bash
# The demo's grid on a real Slurm, with jobs killed in four ways on the way: they resume and end with the same bytes.
#   tests/slurm/run.sh [PYTHON]     PYTHON has mimlab's packages and snakemake-executor-plugin-slurm; default: python
# Half an hour on two cores that have other work too. Needs slurmctld, slurmd and munged; starts its own, works on a copy of the project in a
# folder of its own and removes both. Not part of `make test`.
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

once_training() { # JOB COMMAND...: run the command with the Slurm job's number once the job has a checkpoint
  local job=$1 folder id
  folder=$(work_of "$job")
  shift
  until compgen -G "$folder/*checkpoint*" > /dev/null && id=$(slurm_job "$job") && [ "$id" ]; do sleep 0.3; done
  "$@" "$id"
  say "$job, Slurm job $id: $*"
}

preempt() { sbatch --parsable --partition urgent --cpus-per-task 2 --mem 100 --output /dev/null --wrap 'sleep 5' > /dev/null; }
murder() { kill -KILL $(scontrol listpids "$1" | awk 'NR > 1 && $1 > 0 { print $1 }'); } # as for lack of memory
overrun() { scontrol update "JobId=$1" TimeLimit=1 && scancel --signal STOP "$1"; } # asleep until its minute is over

once_training target/teacher preempt & children+=($!)
once_training pretrain/mae-s0 scancel & children+=($!)
once_training pretrain/supervised-s0 murder & children+=($!)
once_training pretrain/beitv2-s0 overrun & children+=($!)

"$python" -m snakemake --profile profiles/slurm \
  --slurm-status-command squeue --slurm-no-account --slurm-init-seconds-before-status-checks 5 \
  --set-threads data=1 target=1 pretrain=1 transfer=1 \
  --set-resources data:mem_mb=2000 target:mem_mb=2000 pretrain:mem_mb=2000 transfer:mem_mb=2000 report:mem_mb=2000 pretrain:gpu=1 \
  --config dvc=false > "$place/snakemake.log" 2>&1 || { tail -n 40 "$place/snakemake.log"; exit 1; }
wait "${children[@]}"

say "the grid is done; every killed job has resumed:"
for job in target/teacher pretrain/mae-s0 pretrain/supervised-s0 pretrain/beitv2-s0; do
  grep -H 'continuing at step' "logs/$job.log" || { echo "$job did not resume:"; cat "logs/$job.log"; exit 1; }
done

say "without Slurm, never killed, the same bytes:"
mkdir -p other/results && cp -r results/data other/results/
"$python" -m stages.pretrain --run mae-s0 --params params.yaml --results other/results
diff -r results/pretrain/mae-s0 other/results/pretrain/mae-s0 --exclude manifest.json

"$python" -m workflow.plan | tail -n 3
[ "$("$python" -m snakemake -n 2>&1 | grep -c 'Nothing to be done')" = 1 ]
passed=yes
say "passed"
