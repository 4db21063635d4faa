#!/usr/bin/env bash
# Reproduce Safer-Instruct as published: reversed tuning, induction, filter, responses, SFT, DPO, evaluation.
#
#   LLAMA=/models/llama-7b ALPACA=/models/alpaca-7b ALPACA_DATA=alpaca_data.json CORPUS=unsafe.jsonl \
#     TEST_SET=test_set.csv EXPERT="expert=openai expert.model=NAME" bash scripts/reproduce.sh
#
# Every stage is one command, printed before it runs. On a rerun, the entrypoints skip finished stages and
# resume an unfinished one. STAGES="sft dpo" runs only some stages; DRY_RUN=1 only prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LLAMA=${LLAMA:?LLAMA=FOLDER: the starting model of reversed tuning}
ALPACA=${ALPACA:?ALPACA=FOLDER: the policy before SFT and DPO}
ALPACA_DATA=${ALPACA_DATA:?ALPACA_DATA=FILE: instruction, input, output}
CORPUS=${CORPUS:?CORPUS=FILE: the unsafe responses}
TEST_SET=${TEST_SET:?TEST_SET=FILE: the evaluation prompts (instruction, label)}
EXPERT=${EXPERT:?EXPERT="expert=openai expert.model=NAME": filters, answers and judges}
SI_DATA=${SI_DATA:-data/si}               # made by induce.py; or the published CSV files, with STAGES="sft dpo evaluate"
REPORT=${REPORT:-runs/report}
TRAINER=${TRAINER:-BasicTrainer}
STAGES=${STAGES:-reverse induce sft dpo evaluate}
EXTRA=${EXTRA:-}                          # further overrides of train.py
PYTHON=${PYTHON:-python}

run() {
  printf '\n+ %s\n' "$*"
  [[ -n ${DRY_RUN:-} ]] || "$@"
}

# Section 3.1: P(instruction | response), on Alpaca data with the roles swapped.
reverse() {
  run "$PYTHON" -u train.py experiment=reverse model=llama7b model.name_or_path="$LLAMA" \
    datasets.alpaca.path="$ALPACA_DATA" trainer="$TRAINER" $EXTRA
}

# Sections 3.2 to 3.4: an instruction for each unsafe response, the expert's filter, the expert's safe responses.
induce() {
  run "$PYTHON" -u induce.py model=blank_model model.name_or_path=runs/reverse corpus.path="$CORPUS" exclude="$TEST_SET" \
    output="$SI_DATA" $EXPERT
}

# Section 4: supervised fine-tuning on the safe responses, then DPO against the unsafe ones.
sft() {
  run "$PYTHON" -u train.py model=alpaca7b model.name_or_path="$ALPACA" datasets=[si] datasets.si.path="$SI_DATA" \
    datasets.si.exclude="$TEST_SET" loss=sft exp_name=si_sft gradient_accumulation_steps=4 batch_size=64 \
    eval_batch_size=32 trainer="$TRAINER" sample_during_eval=false $EXTRA
}

dpo() {
  run "$PYTHON" -u train.py model=alpaca7b model.name_or_path="$ALPACA" model.archive=runs/si_sft datasets=[si] \
    datasets.si.path="$SI_DATA" datasets.si.exclude="$TEST_SET" loss=dpo loss.beta=0.1 exp_name=si_dpo \
    gradient_accumulation_steps=4 batch_size=32 eval_batch_size=16 trainer="$TRAINER" sample_during_eval=false \
    model.fsdp_policy_mp=bfloat16 $EXTRA
}

# Section 5: harmful rate of all three models on held-out prompts.
evaluate() {
  run "$PYTHON" -u evaluate.py models.alpaca.path="$ALPACA" models.sft.path=runs/si_sft models.dpo.path=runs/si_dpo \
    prompts.test.path="$TEST_SET" prompts.test.kind=unsafe prompts.test.source_column=label output="$REPORT" $EXPERT
}

for stage in $STAGES; do
  case $stage in
    reverse | induce | sft | dpo | evaluate) "$stage" ;;
    *) echo "STAGES: unknown stage '$stage'; known: reverse induce sft dpo evaluate" >&2; exit 2 ;;
  esac
done
