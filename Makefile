# make train and make test need Python 3.11+, a C++ compiler and, once, the network: they make .venv and install into it.
# PYTHON=python3 make ... uses what is installed already.
ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
endif

help:           ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

train: kernels pictures ## train the tiny model in FP4 on the default corpus, then let it write: 3 minutes on two cores
	$(PYTHON) quartet.py --precision fp4 --size tiny

ablation: kernels pictures ## the same model in BF16 (float32 on a CPU) and in FP4: one table, one picture
	$(PYTHON) quartet.py --precision bf16,fp4 --size tiny

kernels: $(INSTALLED) ## compile the kernels for this machine
	$(PYTHON) -c "import fp4; fp4.build()"

pictures: $(INSTALLED)
	$(PYTHON) -c "import matplotlib" 2>/dev/null || $(PYTHON) -m pip install -q matplotlib

bench: kernels  ## on a GPU: kernels against a copy, linears against compiled BF16
	$(PYTHON) -m fp4.bench

compile:        ## compile every .cu for every GPU it is meant for; needs nvcc, no GPU and no torch
	for gpu in 80 89 90 100 120; do nvcc -O3 -std=c++17 -fmad=false -Werror all-warnings \
	    -gencode=arch=compute_$$gpu,code=sm_$$gpu -c fp4/quantize.cu -o /dev/null && echo "quantize.cu for sm_$$gpu" || exit 1; done

test: $(INSTALLED) ## all tests
	$(PYTHON) -c "import pytest, matplotlib" 2>/dev/null || $(PYTHON) -m pip install -q pytest matplotlib
	$(PYTHON) -m pytest -q tests

lines:          ## lines a file, against the reading budget
	@python3 tests/lines.py

clean:          ## remove what was built and prepared; keeps out/
	rm -rf fp4/build data/*/ .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.PHONY: help train ablation kernels pictures bench compile test lines clean
