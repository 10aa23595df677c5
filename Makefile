SHELL := bash
PYTHON ?= python3
VENV := .venv
SEED ?= new
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow exact exact-kernels exact-random fuzz-checkpoints fuzz-schedules lint validate-planner bench-planner simulate-sharing chaos bench-faults bench-faults-gpu bench-snapshot bench-watching bench-gpu wheel constraints bench-moe-1b clean

# Trains a real MoE on this machine at TP2 x DP2 with EP2, kills one of its four ranks on the way, and recovers.
demo: $(VENV)/.ready
	$(BIN)/fivefold run quickstart layout.tp=2 layout.ep=2 fault.kill_rank=3 fault.at_step=50

test: lint
	$(BIN)/python -m pytest tests/kernels
	$(BIN)/python -m pytest

# Longer suites, run before a release.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

# Every kind of layout against the oracle, on two cores in under 40 minutes; the results are kept.
exact: $(VENV)/.ready
	$(BIN)/python tests/exactness/run.py --json docs/exactness/cpu-fp32.json

# The same with the kernels that GPUs run, which Triton interprets here: ten minutes for three layouts.
exact-kernels: $(VENV)/.ready
	TRITON_INTERPRET=1 $(BIN)/fivefold exact quickstart layout.tp=2 layout.dp=2 layout.ep=2
	TRITON_INTERPRET=1 $(BIN)/fivefold exact quickstart layout.dp=2 layout.pp=2 layout.ep=1
	TRITON_INTERPRET=1 $(BIN)/fivefold exact quickstart engine=deepspeed layout.dp=2 layout.ep=2 layout.zero_stage=2

# Each night: other layouts, drawn from a seed that is printed first.
exact-random: $(VENV)/.ready
	$(BIN)/python tests/exactness/run.py --seed $(SEED)

# Trainings killed, or refused by their disk, at 600 seeded changes to their checkpoints, or these damaged; each resumed.
fuzz-checkpoints: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python tests/orchestrator/worker/crashes.py 600 docs/benchmarks/crashes.json

# Swapped activations through 10,000 random pipeline schedules whose copies are late by chance: six minutes.
fuzz-schedules: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python tests/parallel/schedules.py 10000 docs/benchmarks/schedules.json

# What the planner predicts of a table of published measurements, by source: make validate-planner TABLE=path.
validate-planner: $(VENV)/.ready
	$(BIN)/python -m parallel.validation $(TABLE)

# How quickly layouts are searched for, at 1,024 and 16,384 devices, on one core.
bench-planner: $(VENV)/.ready
	$(BIN)/python tests/planner/bench.py --json docs/planner/search-speed.json

# What sharing experts gains from 32 to 1,024 devices, on skewed traces: two minutes.
simulate-sharing: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python tests/planner/sharing.py --json docs/planner/sharing.json

# Every kind of fault into one small job on this machine, each to be found, named and answered: four minutes.
chaos: $(VENV)/.ready
	$(BIN)/python -m pytest -m chaos -rP tests/e2e/test_chaos_run.py

# From a fault to the next trained step under torchrun, Ray Train v2 and Fivefold: up to ten minutes.
bench-faults: $(VENV)/.ready
	@$(PIP) 'ray[train]'
	$(BIN)/python tests/faults/bench.py --json docs/benchmarks/faults.json

# On a machine of two GPUs: a billion-parameter MoE killed, stopped, hung and out of memory; what snapshots cost it.
bench-faults-gpu:
	python3 tests/faults/gpu.py --json docs/benchmarks/faults-gpu.json

# How long training waits for a copy of 512 MB of state, beside torch's asynchronous checkpoints.
bench-snapshot: $(VENV)/.ready
	PYTHONPATH=. $(BIN)/python tests/faults/snapshot.py --json docs/benchmarks/snapshot.json

# What watching costs, how soon a rank that is a fifth slower is named, ten thousand healthy steps: a quarter of an hour.
bench-watching: $(VENV)/.ready
	$(BIN)/python tests/faults/watching.py --json docs/benchmarks/watching.json

# On a machine of one GPU or more: kernels and layers beside other software, long sequences; the last, experts that ranks
# share, takes two. The figures of docs/benchmarks.
bench-gpu:
	fivefold bench kernels --out docs/benchmarks/kernels-h200.json
	fivefold bench layer --out docs/benchmarks/layer-h200.json
	fivefold bench offload --out docs/benchmarks/offload-h200.json
	fivefold bench longest --out docs/benchmarks/longest-h200.json
	fivefold bench sharing --out docs/benchmarks/sharing-h200.json

lint: $(VENV)/.ready
	@twice=$$(find tests -name 'test_*.py' -printf '%f\n' | sort | uniq -d); \
	  test -z "$$twice" || { echo "pytest takes two files of one name for one: $$twice"; exit 1; }
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch comes first and alone: where the machine offers a CPU build, nothing after it asks for another.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about two minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@DS_BUILD_OPS=0 $(PIP) --editable '.[dev]'
	@touch $@

wheel: $(VENV)/.ready
	$(BIN)/python -m build --wheel

# On a machine of two GPUs. The figures of docs/benchmarks.md come from here.
bench-moe-1b:
	fivefold run moe_1b layout.tp=2 layout.ep=2 train.steps=50 checkpoint.interval=20 fault.kill_rank=1 fault.at_step=35

# The versions of the present environment, which every set-up then takes.
constraints: $(VENV)/.ready
	{ echo "# Every package of a set-up that passed the whole test suite. Refresh: make constraints."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
