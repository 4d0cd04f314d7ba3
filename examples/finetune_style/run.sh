# Teach a model the style: how it writes, and how well it predicts other code, before and after.
#
#     sh run.sh OUT [MODEL] [PLAIN]
#
# MODEL is the bundled model if not given; PLAIN is held-out code for rodimus-mlx perplexity. ITERS (120),
# LEARNING_RATE (3e-4) and FUNCTIONS (50, that the style is measured on) may be set in the environment.
set -eu
here=$(dirname "$0")
out=${1:?give a folder to write to}
model=${2:-$(python -c 'from rodimus_mlx.loading import DEMO_FOLDER; print(DEMO_FOLDER)')}
plain=${3:-$out/data/plain.jsonl}

python "$here/make_data.py" "$out/data"

echo "--- before"
python "$here/measure_style.py" "$model" "$out/data" "" "${FUNCTIONS:-50}"
rodimus-mlx perplexity "$model" --data "$plain" --window 1024 --max-tokens 20000

rodimus-mlx finetune --model "$model" --data "$out/data" --out "$out/adapter" --iters "${ITERS:-120}" --batch-size 8 \
    --seq-len 256 --learning-rate "${LEARNING_RATE:-3e-4}" --schedule cosine --warmup 10 --mask-prompt --no-chat \
    --eval-every 40

echo "--- after"
python "$here/measure_style.py" "$model" "$out/data" "$out/adapter" "${FUNCTIONS:-50}"
rodimus-mlx perplexity "$model" --adapter "$out/adapter" --data "$plain" --window 1024 --max-tokens 20000
