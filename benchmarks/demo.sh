#!/usr/bin/env bash
# The demonstration: one real language model, pruned two ways, each with its page.
#   out/demo/weights   half of the weights, by SparseGPT, as a mask
#   out/demo/ffn       three quarters of the FFN neurons, really cut
set -euo pipefail
cd "$(dirname "$0")/.."
secateur=.venv/bin/secateur
text=(--text builtin --samples 16 --length 512)

$secateur inspect smollm2
$secateur prune smollm2 -o out/demo/weights --space weight --method sparsegpt --sparsity 0.5 "${text[@]}" --curve --overwrite
$secateur prune smollm2 -o out/demo/ffn --space ffn --score wanda --keep 0.75 "${text[@]}" --overwrite

echo
echo "Open out/demo/weights/report.html and out/demo/ffn/report.html in a browser."
