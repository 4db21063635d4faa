# Shared by the batch scripts of this folder, which source it from the folder where sbatch was called.
#
#   run_step PROGRAM ARGUMENT...
#
# runs `$PYTHON -u PROGRAM ARGUMENT...` in each task of the job, and exits with its status. Two minutes before the time
# limit, Slurm sends SIGUSR1 (--signal): the program saves its state and exits with status 75, and this script requeues
# the job. A job that is preempted, or requeued by scontrol, gets SIGTERM, and Slurm requeues it. scancel ends it.
# shellcheck shell=bash

run_step() {
  local status=0 job=$SLURM_JOB_ID
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it from sbatch
  srun --kill-on-bad-exit=1 "${PYTHON:-python}" -u "$@" || status=$?
  if ((status == 75)); then # PREEMPTED_STATUS of trainers/distributed/preemption.py
    # Use the id of the task, because the id of the array would requeue all tasks.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "requeued: job $job will resume where it stopped"
    scontrol requeue "$job"
  fi
  exit "$status"
}
