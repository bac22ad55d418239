#!/usr/bin/env bash
# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: random cases on buffers without a spare byte.
#   benchmarks/sanitize.sh [CASES]
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags=(-O1 -g -std=c++17 -fopenmp -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all)
for source in benchmarks/sanitize.cpp src/secateur/sparse/csrc/*.cpp; do
  "${CXX:-g++}" "${flags[@]}" -c "$source" -o "$build/$(basename "${source%.cpp}").o"
done
"${CXX:-g++}" "${flags[@]}" "$build"/*.o -o "$build/sanitize"
OMP_WAIT_POLICY=passive "$build/sanitize" "${1:-2000}"
