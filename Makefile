# Every target makes what it needs: the first one on a fresh clone also builds .venv.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
RANKS := $(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc_per_node 2

# One thread a process: the ranks share the cores, and more threads are many times slower.
export OMP_NUM_THREADS ?= 1

# Small CPU work loses time to torch.compile, which also wants a C++ compiler.
demo test evidence: export TORCHDYNAMO_DISABLE ?= 1

# Megatron warns at every import that Transformer Engine and Apex are not there. They need not be.
demo pretrain evidence: export PYTHONWARNINGS ?= ignore::UserWarning

.DEFAULT_GOAL := help
.PHONY: help venv demo test check pretrain evidence clean

help:  ## list these targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP)  ## build .venv with the pinned packages and this one, once

$(STAMP): setup.py requirements/torch.txt requirements/cpu.txt requirements/dev.txt requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python 3.11 or later, found " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c requirements/constraints.txt setuptools wheel
	$(PIP) install -q -c requirements/constraints.txt -r requirements/torch.txt
	$(PIP) install -q -r requirements/dev.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## align the small generator on two CPU ranks; ARGS="num_updates=2 seed=3"
	@$(RANKS) -m megatron_kvpo.train examples/shapes/demo.yaml $(ARGS)

pretrain: $(STAMP)  ## train the small generator that the demo starts from; ARGS as above
	@$(BIN)/python -m megatron_kvpo.training.pretrain examples/shapes/pretrain.yaml $(ARGS)

evidence: $(STAMP)  ## real, shuffled, negated and lr 0 over three seeds
	@$(BIN)/python -m tools.evidence --prompts examples/shapes/prompts_evidence.jsonl --noises 4 $(ARGS)

test: $(STAMP)  ## all tests; ARGS="-k pages" picks some, WORKERS=1 runs one at a time
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=15 $(ARGS)

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict megatron_kvpo

clean:  ## remove caches and build output; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find megatron_kvpo tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
