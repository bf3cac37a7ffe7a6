#!/usr/bin/env bash
# Import the published TokenFormer weights, and print their scores on the paper's six tasks next to the paper's.
#
#   bash examples/evaluation/published_weights.sh SIZE              SIZE is 150M, 450M, 900M or 1.5B; downloads what it needs
#   bash examples/evaluation/published_weights.sh SIZE DIRECTORY    DIRECTORY holds pytorch_model.bin and 20B_tokenizer.json
#
# Run it from the root of the repository, in an environment with `pip install '.[eval]'`. Results go to runs/published/SIZE;
# files that exist there are not made again. TASKS=DIR uses the tasks that offline_tasks.py wrote to DIR, without a network.
# Arguments in LM_EVAL go to lm-eval, such as LM_EVAL="--limit 200".
set -euo pipefail

size=${1:-}
case $size in
    150M) repository=TokenFormer-150M heads=12 ;;
    450M | 900M) repository=TokenFormer-$size heads=16 ;;
    1.5B) repository=TokenFormer-1-5B heads=16 ;;
    *) echo "error: name a size: 150M, 450M, 900M or 1.5B" >&2 && exit 2 ;;
esac
run=runs/published/$size
files=${2:-$run/files}
mkdir -p "$run"

if [ -z "${2:-}" ] && [ ! -e "$files/20B_tokenizer.json" ]; then
    echo "== 1/3 download $repository and the tokenizer of GPT-NeoX-20B"
    command -v hf >/dev/null || { echo "error: hf is missing: pip install huggingface_hub" >&2 && exit 1; }
    hf download "Haiyang-W/$repository" pytorch_model.bin --local-dir "$files"
    hf download EleutherAI/gpt-neox-20b tokenizer.json --local-dir "$files"
    mv "$files/tokenizer.json" "$files/20B_tokenizer.json"
fi

if [ ! -e "$run/checkpoint/latest" ]; then
    echo "== 2/3 import the weights"
    python -m megatron_tf convert-checkpoint --from official --to megatron_tf --load "$files/pytorch_model.bin" \
        --save "$run/checkpoint" --num-attention-heads $heads --norm-activation l2_norm_gelu \
        --tokenizer-type HFTokenizer --tokenizer-model "$files/20B_tokenizer.json"
fi

echo "== 3/3 score the six tasks"
if [ -n "${TASKS:-}" ]; then
    tasks=(--include_path "$TASKS" --tasks tokenformer_paper)
    export HF_HUB_OFFLINE=1
else
    tasks=(--tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande)
fi
# LM_EVAL holds several arguments, so it is split into words
# shellcheck disable=SC2086
python -m megatron_tf lm-eval run --model megatron_tf --model_args "checkpoint=$run/checkpoint" --batch_size auto \
    --output_path "$run/results" "${tasks[@]}" ${LM_EVAL:-}
python "$(dirname "$0")/compare_with_paper.py" "$size" "$run/results"
