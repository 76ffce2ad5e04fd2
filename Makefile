# Everything runs in .venv (with transformers 5: in .venv-t5), which the first target that needs it makes.
PYTHON ?= python3
VENV ?= .venv
VENV5 ?= .venv-t5
MODEL ?= smollm2
SPARSITY ?= 0.2
DISTIL ?= none
TEXT ?=
OUT ?= out
# Processes that share the tests, each with one thread; 0: one with all.
JOBS ?= 2

BIN = $(VENV)/bin
READY = $(VENV)/.ready
READY5 = $(VENV5)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test families test-transformers5 test-slow test-arm64 lint types check install bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(READY5): pyproject.toml constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install --quiet -c constraints-transformers5.txt -e '.[genai,test]'
	touch $@

install: $(READY)  ## Make .venv with everything in it

models/%/config.json: | examples/get_%.py $(READY)
	$(BIN)/python examples/get_$*.py models/$*

demo: $(READY) models/$(MODEL)/config.json  ## Prune SmolLM2-135M, export, quantize, let it talk, print the report (MODEL=gemma3, TEXT=file, SPARSITY=0.2, DISTIL=10min)
	$(BIN)/python examples/demo.py --model models/$(MODEL) --sparsity $(SPARSITY) --distil $(DISTIL) $(if $(TEXT),--text $(TEXT)) $(OUT)/demo

test: $(READY)  ## Run the default tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Left out, to save minutes: what transformers has no part in. The command line itself is what the tests of interrupted runs
# start.
NOT_TRANSFORMERS = allocation bad_inputs claims cli core_mathematics distributed explain files fuzz recipe rounding
test-transformers5: $(READY5)  ## Run the default tests that need no exporter of Optimum's, with transformers 5
	COMP_TEST_WITHOUT_ONNX=1 $(VENV5)/bin/python -m pytest -n $(JOBS) --dist loadfile $(foreach NAME,$(NOT_TRANSFORMERS),--ignore tests/test_$(NAME).py)

families: $(READY) $(READY5)  ## Write docs/families.md from what the contract tests find with transformers 4 and 5
	COMP_WRITE_TABLE=1 $(BIN)/python -m pytest tests/test_contract.py
	COMP_WRITE_TABLE=1 COMP_TEST_WITHOUT_ONNX=1 $(VENV5)/bin/python -m pytest tests/test_contract.py

# The real model by itself, with a thread for each core: one process would wait for the other's tests at the end.
REAL = tests/test_real_model.py
test-slow: $(READY) models/smollm2/config.json  ## Run the tests on the real model
	COMP_TEST_MODEL=models/smollm2 $(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile --ignore $(REAL)
	COMP_TEST_MODEL=models/smollm2 $(BIN)/python -m pytest -m slow $(REAL)

test-arm64: $(READY) models/smollm2/config.json  ## Run quantized models on emulated 64-bit Arm cores (needs apt, no root)
	COMP_TEST_MODEL=models/smollm2 $(BIN)/python -m pytest -m slow tests/test_arm64.py -rs -s

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)  ## Check types, and that every test imports what there is
	$(BIN)/mypy
	$(BIN)/python -m pytest --collect-only -qq -m ''

check: lint types test  ## Lint, types and default tests

bench: $(READY) models/smollm2/config.json  ## Cost of pruning, its quality, and dense and pruned models side by side (TEXT=file)
	$(BIN)/python benchmarks/cost.py --model models/smollm2
	$(BIN)/python benchmarks/quality.py --model models/smollm2 $(if $(TEXT),--calibration $(TEXT):0:0.6 --text $(TEXT):0.6:1)
	$(BIN)/python benchmarks/speed.py --model models/smollm2 --report $(OUT)/speed $(if $(TEXT),--text $(TEXT))

clean:  ## Remove what was made, but for .venv, .venv-t5, .arm64 and models
	rm -rf $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
