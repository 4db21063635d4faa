# What the batch scripts of this folder share; they source it from the folder in which sbatch was typed.
#
#   run_step PROGRAM ARGUMENT...
#
# runs `$PYTHON -u PROGRAM ARGUMENT...` in each task of the job, and ends the script with its status. Two minutes before
# the time limit Slurm sends SIGUSR1 (--signal): the program keeps what it has, ends with status 75, and is requeued
# here. A job that is preempted or requeued by scontrol gets SIGTERM, and Slurm itself queues it again. scancel ends it.
# shellcheck shell=bash

run_step() {
  local status=0 job=$SLURM_JOB_ID
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from sbatch
  srun --kill-on-bad-exit=1 "${PYTHON:-python}" -u "$@" || status=$?
  if ((status == 75)); then # PREEMPTED_STATUS of trainers/distributed/preemption.py
    # The id of a task, not that of its array, by which all tasks would be requeued.
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "requeued: job $job goes on where it stopped"
    scontrol requeue "$job"
  fi
  exit "$status"
}
