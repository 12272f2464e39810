PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.stamp
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv train browser test test-fast lint docs bench study fuzz fault-campaign gpu-session gpu-rehearsal gpu-check gpu-bench clean

help:
	@echo "make venv    the virtual environment in $(VENV), pinned by constraints.txt (PYTHON=$(PYTHON))"
	@echo "make train   finetune the embedded model on this machine; ARGS='--seed 1 ...' is passed on"
	@echo "make test    the test suite, on a CPU; ARGS='-k name' is passed on"
	@echo "make test-fast  the part of it that one runs while working"
	@echo "make browser  what the tests open the HTML report with: Chromium, if this is Debian and you are root, and two packages of npm"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation, built into site/"
	@echo "make bench   the benchmarks; without a GPU, the plain torch references only"
	@echo "make study   every study of configs/studies, one after the other, some hours on two cores; STUDIES='pairing clipping'"
	@echo "make fuzz    100,000 nearly right recipes, indices, shards, manifests, requests: each is read, or refused in one line"
	@echo "make fault-campaign  faults put into running jobs on CPU ranks, and a table of what became of them; ARGS='--only SIGKILL'"
	@echo "make gpu-session  all that is worth knowing of this machine's GPU in 13 minutes, with $(PYTHON); ARGS='--parts kernels,engine'"
	@echo "make gpu-rehearsal  its long parts on a CPU, with the embedded model, before they are taken to a GPU"
	@echo "make gpu-check  its parts that say whether all is right: kernel tests, and the engine job by job"
	@echo "make gpu-bench  an SD v1.4-shaped epoch on this machine's GPU, eager against the full path, with $(PYTHON)"
	@echo "make clean   remove caches and build products, keep $(VENV) and runs"

venv: $(STAMP)

$(STAMP): setup.py constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)" >&2
	@$(VENV)/bin/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Without a GPU, two single-threaded ranks do more than one rank with two threads; with GPUs, DeepSpeed takes them all.
RANKS ?= $(shell command -v nvidia-smi >/dev/null || { [ "$$(nproc)" -gt 1 ] && echo 2; })

# The launcher's own log would come after the run directory's path, which is the last line.
train: $(STAMP)
	@. $(VENV)/bin/activate && deepspeed $(if $(RANKS),--num_gpus $(RANKS)) --log_level warning prdp_fast/train.py --config zero2.json --recipe tiny $(ARGS)

# One thread a process, so that numbers do not depend on the machine and two ranks do not fight over two cores; two processes, a
# file at a time each. Never the network, never a GPU.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= python -m pytest -q -n 2 --dist loadfile

test: $(STAMP)
	@. $(VENV)/bin/activate && $(PYTEST) -m "not rehearsal" $(ARGS)

# What takes no launched job, no compiler and no interpreter of kernels.
test-fast: $(STAMP)
	@. $(VENV)/bin/activate && $(PYTEST) -m "not slow and not distributed" --ignore tests/kernels $(ARGS)

browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { apt-get update -qq && apt-get install -qq -y chromium >/dev/null; }
	@npm ci --prefix tests/browser --silent --no-audit --no-fund

# The parts of gpu-session that take minutes on a CPU, before they are taken to a GPU.
gpu-rehearsal: $(STAMP)
	@. $(VENV)/bin/activate && $(PYTEST) -m rehearsal tests/benchmarks $(ARGS)

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

DOCS_STAMP := $(VENV)/.docs

$(DOCS_STAMP): $(STAMP)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# The build itself needs no network. A broken link or anchor is an error.
docs: $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo site/index.html

# Operators on CUDA if there is a device, the plain torch references on a CPU if not.
bench: $(STAMP)
	@. $(VENV)/bin/activate && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m pytest -q benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)

# The searches come first: others take their learning rates from them. What is finished is left alone, so it goes on after a stop.
STUDIES ?= learning_rates learning_rates_small large_scale small_scale clipping learned_reward online_vs_offline pairing kl_weight subsets
study: $(STAMP)
	@. $(VENV)/bin/activate && for name in $(STUDIES); do OMP_NUM_THREADS=1 prdp study $$name $(if $(RANKS),--num_gpus $(RANKS)) $(ARGS) || exit; done

# Nineteen kinds of input. Another seed finds other ones: PRDP_FUZZ_SEED=1 make fuzz.
fuzz: $(STAMP)
	@. $(VENV)/bin/activate && PRDP_FUZZ_INPUTS=5300 $(PYTEST) --dist load tests/fuzz $(ARGS)

# Half an hour on two cores. It takes signals as they come, and so no pytest.
fault-campaign: $(STAMP)
	@. $(VENV)/bin/activate && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= python -m tests.campaign $(ARGS)

# Not the virtual environment: the machine's own python, with the CUDA build of torch that fits its driver. This package may not be
# installed there.
gpu-session:
	@PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu_session $(ARGS)

gpu-check:
	@PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.kernels.gpu_check $(ARGS)

# Likewise; it needs what training needs in that python.
gpu-bench:
	@PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.epoch.gpu_bench $(ARGS)

clean:
	@rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	@find prdp_fast kernels tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
