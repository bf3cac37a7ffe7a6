#!/usr/bin/env bash
# From text to a grown model: tokenize, train on two tensor-parallel ranks, grow and repartition, train on two pipeline
# stages, generate. About nine minutes on two cores after the set-up. Run it again to go on after an interruption;
# remove runs/quickstart to start over.
set -euo pipefail
. "$(dirname "$0")/setup_environment.sh" tested
export OMP_NUM_THREADS=1

run=runs/quickstart
data=$run/data
mkdir -p $data

echo "== 1/5 tokenizer and data"
[ -e $data/tokenizer.model ] ||
    python tools/train_tokenizer.py --input examples/data/pile_sample_00.jsonl.zst --vocab-size 2048 \
        --output-prefix $data/tokenizer
for part in train:pile_sample_00 heldout:pile_sample_heldout; do
    python tools/preprocess_data.py --input "examples/data/${part##*:}.jsonl.zst" --output-prefix $data/${part%%:*} \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model $data/tokenizer.model --append-eod
done

echo "== 2/5 train on two tensor-parallel ranks with sequence parallelism"
[ -e $run/grown/latest ] ||
    python -m megatron_tf.torchrun --nproc-per-node 2 -m megatron_tf.pretrain examples/quickstart/base.yaml

echo "== 3/5 grow every projection to twice its parameter tokens, for two pipeline stages"
[ -e $run/grown/latest ] ||
    python tools/reshard_checkpoint.py --load $run/base --save $run/grown --grow qkv=256,proj=256,ffn=1024 \
        --target-tensor-parallel-size 1 --target-pipeline-parallel-size 2 --verify

echo "== 4/5 go on training the grown model on two pipeline stages"
python -m megatron_tf.torchrun --nproc-per-node 2 -m megatron_tf.pretrain examples/quickstart/grown.yaml

echo "== 5/5 generate, plot and sum up"
OMP_NUM_THREADS=2 python -m megatron_tf.generate $run/continued --prompt "The history of the" --max-new-tokens 80 \
    --temperature 0.8 --top-p 0.9 --seed 1
python tools/plot_run.py $run/base.jsonl $run/continued.jsonl --output $run/loss.png --summary $run/summary.md \
    --title "TokenFormer grown during training"
echo "The loss curve is in $run/loss.png, the table in $run/summary.md."
