# Python 3.11 or newer, a C++ compiler and, once, the network are needed: the targets make .venv
# and install into it. `PYTHON=python3 make ...` uses what is installed already.
ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
endif
# For what needs no package. It is .venv's, if that is there, because nvcc may be installed in it.
BARE_PYTHON := $(or $(wildcard $(PYTHON)),python3)

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

kernels: nvcc ## install, and compile the kernels for this machine
	@start=$$(date +%s); $(PYTHON) -c "import fp4; fp4.build()" && \
	echo "make kernels: $$(($$(date +%s) - start)) s; next: python quartet.py --precision fp4"

train: kernels matplotlib ## train the tiny model in FP4 and print a sample: 4 minutes on two cores
	$(PYTHON) quartet.py --precision fp4 --size tiny

ablation: kernels matplotlib ## the study of tools/README.md; without a GPU a small one
	$(PYTHON) -m tools.study recipes $(ARGS)

speedrun: kernels matplotlib ## on a GPU: time to a target loss, all in 4 bits; tools/README.md
	$(PYTHON) -m tools.speedrun $(ARGS)

law: kernels matplotlib ## train a small sweep in BF16 and FP4, and fit the scaling law to it
	$(PYTHON) -m tools.scaling sweep --out out/law
	$(PYTHON) -m tools.scaling collect 'out/law/*/log.csv' > out/law/runs.csv
	$(PYTHON) -m tools.scaling fit out/law/runs.csv --picture out/law/law.svg

bench: kernels nvml ## on a GPU: times and joules against BF16, 10 minutes; rewrites fp4/README.md
	$(PYTHON) -m tools.bench

test: test-packages ## the tests, in 6 to 7 minutes on two cores
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m "not slow" tests

test-all: test-packages ## all tests, also those that compile or simulate CUDA
	$(PYTHON) -m pytest -q -n 2 --dist worksteal tests

mutants: test-packages ## plant faults, one at a time, and see whether the tests notice: 20 minutes
	$(PYTHON) -m tools.mutants $(ARGS)

style: ## the reading budget: columns, statements a line, names, tokens a line of code
	@python3 tools/style.py

compile: ## compile every kernel for every GPU it is meant for; needs nvcc, no GPU and no torch
	@$(BARE_PYTHON) -m tools.compile

lessons: kernels ## on a GPU: times the lessons beside what ships; rewrites their README's table
	$(PYTHON) -m tools.lessons --write

sanitize: kernels ## on a GPU: every kernel under compute-sanitizer
	$(PYTHON) -m tools.sanitize

blackwell-report: kernels ## on a Blackwell GPU: test and time its FP4 units
	$(PYTHON) -m tools.blackwell_report

clean: ## remove what was built and prepared; keeps out/
	rm -rf fp4/build .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -not -path './out/*' -prune -exec rm -rf {} +
	python3 -B -m data.clean

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

# A GPU without a CUDA toolkit gets NVIDIA's compiler from its packages for pip (toolchain.py).
# Where they cannot be had, fp4.build() says why the kernels do not build.
nvcc: $(INSTALLED)
ifdef INSTALLED
	@wheels=$$($(PYTHON) -c "from fp4.toolchain import missing_wheels; print(*missing_wheels())"); \
	[ -z "$$wheels" ] || { echo "make kernels: installing $$wheels (100 MB)"; \
	$(PYTHON) -m pip install -q $$wheels || true; }
endif

# NVML's package tells the joules of a GPU.
nvml: $(INSTALLED)
	@$(PYTHON) -c "import pynvml" 2>/dev/null || $(PYTHON) -m pip install -q nvidia-ml-py || \
	echo "bench: no nvidia-ml-py, so that no joules are measured"

matplotlib: $(INSTALLED)
	@$(PYTHON) -c "import matplotlib" 2>/dev/null || $(PYTHON) -m pip install -q matplotlib

# transformers, with its safetensors and tokenizers, loads what tools/huggingface writes.
# nvdisasm shows the tests what machine code nvcc made; without nvcc there is nothing to show.
test-packages: matplotlib
	@$(PYTHON) -c "import pytest, xdist" 2>/dev/null || \
	$(PYTHON) -m pip install -q pytest pytest-xdist
	@$(PYTHON) -c "import transformers" 2>/dev/null || $(PYTHON) -m pip install -q transformers || \
	echo "test: no transformers, so that no model is loaded with it"
	@if command -v nvcc >/dev/null && ! command -v nvdisasm >/dev/null; then \
	$(PYTHON) -m pip install -q nvidia-cuda-nvdisasm || \
	echo "test: no nvdisasm, so that no machine code is checked"; fi

.PHONY: help kernels train ablation speedrun law bench test test-all mutants style compile \
        lessons sanitize blackwell-report clean nvcc nvml matplotlib test-packages
