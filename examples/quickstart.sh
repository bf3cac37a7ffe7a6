#!/usr/bin/env bash
# From text to a grown model: tokenize, train on two tensor-parallel ranks, grow and reshard, continue on two pipeline
# stages, generate.
#
#   bash examples/quickstart.sh           under four minutes on two cores after the installation; in runs/quickstart
#   bash examples/quickstart.sh --full    three times the steps, for a better model; in runs/quickstart_full
#
# After an interruption, run it again to resume. Remove the directory of the run to start over.
set -euo pipefail
run=runs/quickstart base_steps=160 all_steps=420
case ${1:-} in
    "") ;;
    --full) run=runs/quickstart_full base_steps=500 all_steps=1200 ;;
    *) echo "error: unknown option $1: the only one is --full" >&2 && exit 2 ;;
esac
. "$(dirname "$0")/setup_environment.sh" tested
export OMP_NUM_THREADS=1

data=$run/data
mkdir -p $data
for config in base:$base_steps grown:$all_steps; do
    sed "s|runs/quickstart|$run|; s/train_iters: .*/train_iters: ${config#*:}/" "examples/quickstart/${config%:*}.yaml" \
        >"$run/${config%:*}.yaml"
done

echo "== 1/5 train a tokenizer, and convert text to token ids"
[ -e $data/tokenizer.model ] ||
    python tools/train_tokenizer.py --input examples/data/pile_sample_00.jsonl.zst --vocab-size 2048 \
        --output-prefix $data/tokenizer
for part in train:pile_sample_00 heldout:pile_sample_heldout; do
    python tools/preprocess_data.py --input "examples/data/${part##*:}.jsonl.zst" --output-prefix $data/${part%%:*} \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model $data/tokenizer.model --append-eod
done

echo "== 2/5 train on two tensor-parallel ranks with sequence parallelism"
[ -e $run/grown/latest ] ||
    python -m megatron_tf.torchrun --nproc-per-node 2 -m megatron_tf.pretrain $run/base.yaml

echo "== 3/5 grow every projection to twice its parameter tokens, for two pipeline stages"
[ -e $run/grown/latest ] ||
    python tools/reshard_checkpoint.py --load $run/base --save $run/grown --grow qkv=256,proj=256,ffn=1024 \
        --rewarmup-iters 40 --rewarmup new \
        --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2 --verify

echo "== 4/5 continue training the grown model on two pipeline stages"
python -m megatron_tf.torchrun --nproc-per-node 2 -m megatron_tf.pretrain $run/grown.yaml

echo "== 5/5 generate text, and plot the loss"
OMP_NUM_THREADS=2 python -m megatron_tf.generate $run/continued --prompt "The history of the" --max-new-tokens 80 \
    --temperature 0.8 --top-p 0.9 --seed 1
python tools/plot_run.py $run/base.jsonl $run/continued.jsonl --output $run/loss.png --summary $run/summary.md \
    --title "TokenFormer grown during training"

cat <<END

Done. The model grew at step $base_steps without changing its logits (max |delta logit| above), and continued training.
  $run/loss.png      loss against tokens, with the growth marked
  $run/summary.md    the table above
  $run/continued     checkpoints of the grown model

Try next, with .venv/bin on your PATH:
  megatron-tf inspect-checkpoint $run/continued
  megatron-tf generate $run/continued --prompt "In the beginning"
  megatron-tf evaluate $run/continued --data-path $data/heldout_text_document
  docs/tutorial.md explains what you have seen, starting from a Pattention in 30 lines.
END
