#!/bin/sh
# What choice, repair and allocation bring, what seed and text of the calibration change (SmolLM2 at 60 %), and what
# tiles of 16 x 16 cost (10 %): a quarter of the protocol (16 x 1,024 calibration tokens, 16 test windows, bf16
# forwards). Rows that OUT has already are left.
#
#     [THREADS=2] sh benchmarks/ablation.sh C4.jsonl WIKITEXT.txt [OUT]
set -eu
cd "$(dirname "$0")/.."
calibration=$1 test=$2 out=${3:-benchmarks/results}
run() {
    file=$1
    shift
    "${PYTHON:-.venv/bin/python}" benchmarks/methods.py --calibration "$calibration" --test "$test" --samples 16 \
        --windows 16 --threads "${THREADS:-2}" --out "$out/$file" --rows "$@"
}
set --
for budget in uniform rate_distortion atp; do
    for way in wanda sparsegpt alps; do
        set -- "$@" "$way 60% budget=$budget bf16" "$way 60% budget=$budget repair=block_reconstruction bf16"
    done
    set -- "$@" "wanda 60% budget=$budget repair=least_squares bf16" # the others' survivors are fitted already
done
for way in wanda sparsegpt alps; do
    set -- "$@" "$way 60% budget=owl bf16"
done
for rows in root fisher; do
    for budget in uniform rate_distortion; do
        set -- "$@" "alps:rows=$rows 60% budget=$budget bf16"
    done
    set -- "$@" "alps:rows=$rows 60% budget=rate_distortion repair=block_reconstruction bf16"
done
way="sparsegpt:polish=0 60% budget=uniform"
set -- "$@" "$way bf16" "$way repair=least_squares bf16"
for fit in dense mix; do # what is fitted on the pruned model's inputs stands above
    set -- "$@" "wanda 60% budget=uniform fit_on=$fit repair=least_squares bf16"
    set -- "$@" "sparsegpt 60% budget=uniform fit_on=$fit bf16" "alps 60% budget=uniform fit_on=$fit bf16"
done
for share in 0.12 0.5; do
    set -- "$@" "sparsegpt 60% budget=uniform fit_on=mix:share=$share bf16"
done
set -- "$@" "alps 60% budget=uniform fit_on=mix:share=1 bf16"
way="alps:rows=root 60% budget=rate_distortion"
set -- "$@" "$way fit_on=mix bf16" "$way fit_on=mix repair=block_reconstruction bf16" \
    "$way fit_on=mix:share=1 repair=block_reconstruction bf16"
set -- "$@" "$way repair=block_reconstruction:passes=3 bf16" # four are the default
run ablation.json "$@"
set --
for way in "alps:rows=root 60% budget=rate_distortion" "sparsegpt:polish=0 60%" "sparsegpt 60%" "wanda 60%"; do
    for text in "" " text=builtin"; do
        for seed in 0 1 2; do
            set -- "$@" "$way$text seed=$seed bf16"
        done
    done
done
run sensitivity.json "$@"
set --
way="10% grain=tile:16x16"
for score in magnitude output_error taylor_block fisher; do
    set -- "$@" "$score $way bf16"
done
for budget in atp rate_distortion rate_distortion:most=10; do # ten: no bound
    set -- "$@" "fisher 10% budget=$budget grain=tile:16x16 bf16"
done
run tiles.json "$@" "fisher $way repair=block_reconstruction bf16"
