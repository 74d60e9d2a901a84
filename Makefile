# make setup        .venv with what requirements.txt lists; TORCH=keep uses the PyTorch that is already there
# make demo         a run from end to end on this machine, with a preemption on the way
# make test         set up everything and run the tests (the Slurm ones too where Slurm can be installed, some of them
#                   on a second Slurm, where its tree can be made: as root, with debootstrap)
# make test-quick   the tests that need no process of their own: a minute and a half, and no Slurm
# make lint         ruff and mypy
# make bench        everything beside what one would run instead: a table, JSON, a chart in docs/; QUICK=1 for a glance
# make cluster-up   a real one-machine Slurm to play with; make cluster-down stops it

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-quick lint bench cluster-up cluster-down slurm-packages clean

setup: .venv/.run
	@echo "ready: . .venv/bin/activate"

demo: .venv/.run
	$(BIN)/python -m cifar_hpc.cli.demo

test: .venv/.dev slurm-packages
	$(BIN)/python -m tests.side_by_side

test-quick: .venv/.dev
	$(BIN)/python -m pytest -m "not process"

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.bench
	$(BIN)/python -m benchmarks.suite $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python -m benchmarks.chart)

cluster-up: slurm-packages
	slurm/minicluster/minicluster up
	@echo "to use it, paste this line into your shell (make cluster-down ends it):"
	@slurm/minicluster/minicluster env

cluster-down:
	slurm/minicluster/minicluster down

slurm-packages:
	sh slurm/minicluster/install.sh

# Each stamp is touched last, so a set-up that was interrupted is done again. With TORCH=keep, torch and torchvision are
# those of a module, of conda, or installed into .venv before (a CPU-only one, say); this is remembered in .keep-torch.
.venv/.run: requirements.txt | .venv/bin/python
	@if [ "$(TORCH)" = keep ] || [ -e .venv/.keep-torch ]; then \
	    $(BIN)/python -c 'import torch, torchvision; print("keeping torch", torch.__version__, "and torchvision", torchvision.__version__)' 2>/dev/null || \
	    { echo "error: TORCH=keep: $(BIN)/python cannot import torch and torchvision. HINT: rm -r .venv, load the module or activate conda, and make setup TORCH=keep PYTHON=\$$(which python); or make setup"; rm -f .venv/.keep-torch; exit 1; }; \
	    touch .venv/.keep-torch; \
	    grep -v '^torch' requirements.txt > .venv/requirements.txt; \
	else \
	    echo "installing requirements.txt into .venv: about 5 GB of disk, most of it PyTorch; the first time takes minutes."; \
	    echo "To use a PyTorch that is already there (a module, conda, a CPU-only one): make setup TORCH=keep"; \
	    cp requirements.txt .venv/requirements.txt; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement .venv/requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/requirements.txt --requirement requirements-dev.txt
	touch $@

.venv/.bench: requirements-bench.txt .venv/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/requirements.txt --requirement requirements-bench.txt
	touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $$($(PYTHON) --version 2>&1) is too old: Python 3.11 or newer is needed. HINT: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(if $(filter keep,$(TORCH)),--system-site-packages) .venv || \
	    { rm -rf .venv; echo "error: python3 -m venv failed. HINT: on Debian and Ubuntu install python3-venv"; exit 1; }

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
