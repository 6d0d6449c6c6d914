# The commands of the house. On a machine with Python 3.11 or newer and make nothing else is needed:
# the first command makes .venv and installs what constraints.txt pins.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := test,dev,metrics
# Processes of the test run; each keeps to one thread, so more than the cores is of no use.
JOBS   ?= 2

.PHONY: help demo test faults lint format app bench clean

help: ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## make a small blood mosaic, integrate it, score it, export it (a few minutes)
	$(BIN)/python -m headless.demo

test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --ignore tests/benchmarks

# Workers and schedulers that are killed; MOSAIC_SEED=2 is another series.
KILLS  ?= 200
faults: $(STAMP) ## kill workers and schedulers 200 times at random moments, and the other faults (half an hour)
	MOSAIC_KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -s

lint: $(STAMP) ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## sort imports and mend what ruff can mend safely
	$(BIN)/ruff check --fix .

app: $(STAMP) ## open the window (not part of this version)
	@echo "The window is not part of this version yet; mosaic-headless does everything there is so far: see README.md."
	@exit 2

bench: $(STAMP) ## measure time and memory
	@ls tests/benchmarks/*.py >/dev/null 2>&1 || { echo "There are no benchmarks yet."; exit 2; }
	$(BIN)/python -m pytest tests/benchmarks -s -p no:xdist

clean: ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
