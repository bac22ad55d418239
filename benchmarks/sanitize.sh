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

# The whole library under the package's own tests, the decoding step among them.
cp -r src "$build/src"
suffix=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
rm -f "$build"/src/secateur/sparse/_kernels*.so
"${CXX:-g++}" "${flags[@]}" -fPIC -shared src/secateur/sparse/csrc/*.cpp -o "$build/src/secateur/sparse/_kernels$suffix"
preload="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH="$build/src" \
  .venv/bin/python -m pytest -q -p no:cacheprovider tests/unit/test_step.py tests/unit/sparse
