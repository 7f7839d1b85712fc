# make train and make test need Python 3.11+, a C++ compiler and, once, the network: they make .venv and install into it.
# PYTHON=python3 make ... uses what is installed already.
ifeq ($(origin PYTHON), undefined)
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
endif

help:           ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

train: kernels pictures ## train the tiny model in FP4 on the default corpus, then let it write: 3 minutes on two cores
	$(PYTHON) quartet.py --precision fp4 --size tiny

ablation: kernels pictures ## on a GPU every precision with three seeds, into the README; else the tiny model in two: 5 minutes. Goes on where it was stopped
	$(PYTHON) -m scaling.study $(ARGS)

law: kernels pictures ## train a small sweep in BF16 and FP4, on a CPU a toy of 3 minutes, and fit the scaling law to it; goes on where it stopped
	$(PYTHON) -m scaling sweep --out out/law
	$(PYTHON) -m scaling collect 'out/law/*/log.csv' > out/law/runs.csv
	$(PYTHON) -m scaling fit out/law/runs.csv --picture out/law/law.svg

kernels: $(INSTALLED) ## compile the kernels for this machine
	@start=$$(date +%s); $(PYTHON) -c "import fp4; fp4.build()" && echo "make kernels: $$(($$(date +%s) - start)) s"

pictures: $(INSTALLED)
	$(PYTHON) -c "import matplotlib" 2>/dev/null || $(PYTHON) -m pip install -q matplotlib

bench: kernels  ## on a GPU: kernels, linears and training steps against BF16, 5 to 7 minutes; rewrites the README's tables
	$(PYTHON) -m fp4.bench

# a .cu named after a machine is for that machine, every other one for all of these
GPUS := 75 80 89 90a 100a 120a
GPUS_sm90 := 90a
GPUS_sm100 := 100a 103a
GPUS_sm120 := 120a 121a
machine = $(filter sm%,$(subst _, ,$(basename $(notdir $(1)))))
JOBS = $(foreach cu,$(sort $(wildcard fp4/*.cu)),$(addprefix $(cu)@,$(GPUS$(addprefix _,$(call machine,$(cu))))))

compile:        ## compile every .cu for every GPU it is meant for; needs nvcc, no GPU and no torch
	@command -v nvcc >/dev/null || { echo "compile: there is no nvcc on the PATH; it comes with the CUDA toolkit" >&2; exit 2; }
	@$(MAKE) --no-print-directory -j$$(nproc) $(JOBS)

$(JOBS):
	@file=$(word 1,$(subst @, ,$@)) gpu=$(word 2,$(subst @, ,$@)) start=$$(date +%s); \
	nvcc -O3 -std=c++17 -fmad=false -Werror all-warnings -gencode=arch=compute_$$gpu,code=sm_$$gpu -c $$file -o /dev/null && \
	echo "$$file for sm_$$gpu: $$(($$(date +%s) - start)) s"

blackwell-report: kernels ## on a Blackwell GPU: tests and times of the FP4 products with the real instructions, into blackwell_report.md
	$(PYTHON) tests/blackwell_report.py

sanitize: kernels ## on a GPU: every kernel under compute-sanitizer: memcheck, racecheck, initcheck
	$(PYTHON) tests/sanitize.py

test: $(INSTALLED) ## all tests
	$(PYTHON) -c "import pytest, xdist, matplotlib" 2>/dev/null || $(PYTHON) -m pip install -q pytest pytest-xdist matplotlib
	@command -v nvcc >/dev/null && ! command -v nvdisasm >/dev/null && ! $(PYTHON) -m pip show -q nvidia-cuda-nvdisasm 2>/dev/null && \
	! $(PYTHON) -m pip install -q nvidia-cuda-nvdisasm && echo "test: no nvdisasm, so that no machine code is checked" || true
	$(PYTHON) -m pytest -q -n 2 tests

lines:          ## lines a file, against the reading budget
	@python3 tests/lines.py

clean:          ## remove what was built and prepared; keeps out/
	rm -rf fp4/build data/*/ .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.PHONY: help train ablation law kernels pictures bench compile $(JOBS) sanitize blackwell-report test lines clean
