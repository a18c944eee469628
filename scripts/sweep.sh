#!/usr/bin/env bash
# Runs a study and reports on it: scripts/sweep.sh NAME [key=value ...]
#
#   cd          contrastive decoding: methods x data sets x temperature
#   ensemble    weighted ensemble: the same
#   gamma       tokens that the cheapest member proposes
#   alpha       strength of contrastive decoding
#   weights     weights of an ensemble of two
#
# These are the questions of the tables of arXiv 2502.01662. Each study is a Hydra sweep. Keys after
# the name go to main_dataset.py and override the study's own, so you can make your own study with
# other keys. On several GPUs add hydra/launcher=joblib; on a SLURM cluster add
# hydra/launcher=submitit_slurm (docs/sweeps.md). A study that is started again continues where it
# stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set/p' "$0" | sed '/^set/d; s/^# \{0,1\}//'; }

name=${1:-}
[[ $# -eq 0 ]] || shift
folder=outputs/study-$name
for argument in "$@"; do
  [[ "$argument" != save_path=* ]] || folder=${argument#save_path=}
done

status=0
# If a key is given twice, the last one counts, which is the caller's.
run() {
  local -A last=()
  local argument
  for argument in "$@" "${given[@]}" "save_path=$folder"; do
    last[${argument%%=*}]=$argument
  done
  python main_dataset.py --multirun "${last[@]}" || status=$?
  ((status != 130)) || exit 130 # Ctrl-C
}

given=("$@")
# One request at a time, as the paper measures.
common=(dataset.size=small batch_size=1 method.generate.temperature=0,1)
datasets=dataset.name=humaneval,gsm8k,mmlu,cnndm
case "$name" in
  cd | ensemble | gamma | alpha | weights) ;;
  *)
    usage >&2
    exit 2
    ;;
esac

scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
python scripts/prepare_models.py
case "$name" in
  cd) run "${common[@]}" method=cd,cd_sd,cd_chef "$datasets" method.alpha=0.1,0.5 ;;
  ensemble) run "${common[@]}" method=ensemble,ensemble_sd,ensemble_chef "$datasets" ;;
  gamma)
    run "${common[@]}" method=cd # the baseline of the others; it proposes nothing
    run "${common[@]}" method=cd_sd,cd_chef method.gamma=1,2,3,5,8
    ;;
  alpha) run "${common[@]}" method=cd,cd_sd,cd_chef method.alpha=0.1,0.2,0.3,0.4,0.5 ;;
  weights)
    run "${common[@]}" method=ensemble,ensemble_sd,ensemble_chef \
      "method.weights=[0.9,0.1],[0.7,0.3],[0.5,0.5],[0.3,0.7],[0.1,0.9]"
    ;;
esac
python scripts/report.py "$folder"
exit "$status"
