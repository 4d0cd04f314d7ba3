#!/bin/sh
# The small model from nothing: data, tokenizer, samples, training, measures, pictures (which need matplotlib).
# Works in the folder given (default: out), whose name has no spaces.
#   sh recipe.sh [FOLDER] [MINUTES]
set -eu
here=$(dirname "$0")
out=${1:-out}
minutes=${2:-10}
python=${PYTHON:-python3}

# Add --stdlib FOLDER ... for more Python versions (lib/python3.*): each module is taken from the newest.
[ -f "$out/train.jsonl" ] || "$python" "$here/build_data.py" "$out"
[ -f "$out/tokenizer/tokenizer.json" ] || "$python" "$here/train_tokenizer.py" "$out" "$out/tokenizer"
[ -f "$out/tokens/train.npz" ] || "$python" "$here/tokenize_data.py" "$out" "$out/tokenizer" "$out/tokens" --passes 3

for name in plus rodimus transformer; do
    "$python" "$here/train.py" "$here/config_$name.json" "$out/tokens" "$out/tokenizer" "$out/$name" \
        --minutes "$minutes" --dtype bfloat16
done
all="$out/plus $out/rodimus $out/transformer"
"$python" "$here/bits_per_byte.py" "$out" $all --json > "$out/bits.json"
"$python" "$here/loss_by_position.py" "$out" $all --json > "$out/positions.json"
"$python" "$here/parse_rate.py" "$out" "$out/plus" > "$out/parse.json"
"$python" "$here/card.py" "$out/plus" --sources "$out/sources.json" \
    --bits "$out/bits.json" --parse "$out/parse.json" --positions "$out/positions.json"
"$python" "$here/figures.py" training $all "$out/training.svg"
"$python" "$here/figures.py" positions "$out/positions.json" "$out/positions.svg"
cat "$out/plus/README.md"
