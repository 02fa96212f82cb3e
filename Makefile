# Every target sets up what it needs in .venv: a machine with Python >= 3.10 and make is enough.
#   make demo PYTHON=python3.12                                            another interpreter
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu     on Linux: the small PyTorch, without CUDA
#   make test ARGS="tests/fabric -k seed"                                  some of the tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo crash-demo test test-slow test-faults test-deepspeed test-xla test-s3 lint types check format bench bench-more clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed-dev ## create .venv with all that development needs

demo: $(VENV)/.installed-examples ## train, test and draw a network on handwritten digits
	$(BIN)/python examples/digits.py $(ARGS)

crash-demo: $(VENV)/.installed-examples ## kill a training run twenty times, and see that it ends with the same weights
	$(BIN)/python examples/crash_demo.py $(ARGS)

# More than one thread for each of several test processes would only make them wait for each other.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-dev ## run the tests, two at a time, but for the slow ones; with ARGS, those that it names
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 -m "not slow")

test-slow: export OMP_NUM_THREADS = 1
test-slow: $(VENV)/.installed-dev ## run the slow tests, one by one: whole programs, kills, signals, examples
	$(BIN)/python -m pytest -m slow $(ARGS)

# DeepSpeed compiles its operators when they are first used, which takes a C++ compiler and a minute or two: here before the tests.
COMPILE := import deepspeed; [deepspeed.get_accelerator().create_op_builder(name).load() for name in ("ShareMemCommBuilder", "CPUAdamBuilder")]
test-deepspeed: export OMP_NUM_THREADS = 1
test-deepspeed: export PATH := $(CURDIR)/.venv-deepspeed/bin:$(PATH)
test-deepspeed: export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv-deepspeed/torch_extensions
test-deepspeed: ## run the tests under DeepSpeed, in .venv-deepspeed
	$(MAKE) VENV=.venv-deepspeed .venv-deepspeed/.installed-deepspeed,dev
	DS_ACCELERATOR=cpu .venv-deepspeed/bin/python -c '$(COMPILE)'
	.venv-deepspeed/bin/python -m pytest tests/fabric/strategies/test_deepspeed*.py tests/pytorch/strategies/test_deepspeed*.py $(ARGS)

# torch_xla is built for one release of PyTorch, older than the package otherwise asks for: so it is installed past its requirements.
XLA_NEEDS := torch==2.9.0 torch_xla==2.9.0 numpy 'fsspec[http]' PyYAML packaging tqdm typing-extensions torchmetrics pytest pytest-timeout
XLA_TESTS := $(addprefix tests/,fabric/accelerators/test_xla.py fabric/launchers/test_xla.py fabric/plugins/environments/test_libraries.py \
	$(addprefix fabric/strategies/,test_single_xla.py test_xla.py test_xla_fsdp.py) pytorch/strategies/test_xla.py)
test-xla: export OMP_NUM_THREADS = 1
test-xla: .venv-xla/.installed ## run the tests under torch_xla, on its CPU devices, in .venv-xla
	.venv-xla/bin/python -m pytest $(or $(ARGS),$(XLA_TESTS))

.venv-xla/.installed: pyproject.toml
	@.venv-xla/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-xla
	.venv-xla/bin/python -m pip install --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu $(XLA_NEEDS)
	.venv-xla/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

# s3fs wants an older dateutil than constraints.txt has: so it gets an environment of its own.
test-s3: export OMP_NUM_THREADS = 1
test-s3: .venv-s3/.installed ## run the tests of remote checkpoints, against an S3 server of their own, in .venv-s3
	.venv-s3/bin/python -m pytest $(or $(ARGS),tests/pytorch/trainer/test_saving_remotely.py)

.venv-s3/.installed: pyproject.toml
	@.venv-s3/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-s3
	.venv-s3/bin/python -m pip install --disable-pip-version-check -e '.[dev,s3]'
	.venv-s3/bin/python -m pip install --disable-pip-version-check 'moto[s3]' flask flask-cors  # with the botocore that s3fs wants
	@touch $@

test-faults: export OMP_NUM_THREADS = 1
test-faults: export KERAUNOS_FAULTS = full
test-faults: $(VENV)/.installed-dev ## break disks, files and processes at every place, in full
	$(BIN)/python -m pytest --timeout 3600 -s tests/faults $(ARGS)

lint: $(VENV)/.installed-dev ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## check types
	$(BIN)/mypy

check: lint types ## lint and types

format: $(VENV)/.installed-dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# LIGHTNING: an interpreter of an environment outside of this folder that has Lightning, to be measured beside.
bench: $(VENV)/.installed-dev ## one table: steps by hand, of the Trainer, and by LIGHTNING=PYTHON of Lightning
	$(BIN)/python benchmarks/step_overhead.py $(addprefix --lightning ,$(LIGHTNING))

bench-more: $(VENV)/.installed-dev ## measure imports, start-up, epochs, memory, and what grows with the length of a run
	$(BIN)/python benchmarks/import_cost.py $(addprefix --lightning ,$(LIGHTNING))
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/epoch_turn.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scaling.py

clean: ## remove what runs and tools left behind; .venv stays
	rm -rf build dist demo_runs lightning_logs .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp for each extra: a second call does nothing until the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=/path/to/python3")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
