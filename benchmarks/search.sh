#!/usr/bin/env bash
# What a short search of the allocation brings: Wanda at 60 %, uniform, OWL's, and two searches, a level for each site or for
# each layer. Every search reads about 60 times its 2,048 tokens of text. Perplexity on other text at the end.
# Interrupted? Run it again: it goes on.      bash benchmarks/search.sh [THREADS]
set -euo pipefail
cd "$(dirname "$0")/.."
secateur=.venv/bin/secateur
out=out/search
common=(--space weight --score wanda --sparsity 0.6 --text builtin --samples 8 --length 256 --batch-size 4
        --threads "${1:-2}" --no-measure --resume)
search=evopress:generations=12,offspring=8,survivors=2/1,tokens=512/2048

$secateur prune smollm2 -o $out/layer "${common[@]}" --budget $search,each=layer
$secateur prune smollm2 -o $out/site "${common[@]}" --budget $search
$secateur prune smollm2 -o $out/owl "${common[@]}" --budget owl
$secateur prune smollm2 -o $out/uniform "${common[@]}"
$secateur measure smollm2 $out/uniform $out/owl $out/site $out/layer --windows 8 --length 512
grep -h -A3 '"loss": "KL' $out/layer/report.json $out/site/report.json
