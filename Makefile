# `make demo` and `make test` do all the set-up: they build .venv and work offline afterwards.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The demo and the tests keep to their own threads, so that a busy machine does not make them crawl.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

.PHONY: help demo test test-full bench bench-price bench-tables bench-large gpu lint types format clean
help:
	@echo "make demo       FisherMask with and without a target against margin and random"
	@echo "make test       the tests that run in minutes"
	@echo "make test-full  adds the slow ones and other versions of modAL and scikit-learn"
	@echo "make bench      seconds, memory and gain of whole queries, by asv, a few minutes"
	@echo "make bench-price  whole queries next to the forward pass over their pool, hours"
	@echo "make bench-tables bench-large   the tables of the site's benchmark pages, hours"
	@echo "make gpu        on a machine with CUDA; PART=tests, bench or distributed, docs/results/gpu.txt"
	@echo "make docs       the site in docs/_build/html; docs-fast: without running any example"
	@echo "make dist       wheel and sdist, tried in empty environments"
	@echo "make lint types format clean"

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[plot,test,dev,docs]"
	touch $@

demo: $(VENV)/.stamp
	$(BIN)/python examples/demo.py

test: $(VENV)/.stamp
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-full: test
	$(BIN)/python -m pytest -n 2 -m slow

bench: $(VENV)/.stamp
	$(BIN)/asv machine --yes
	$(BIN)/asv run --python=same --show-stderr --set-commit-hash $$(git rev-parse HEAD)

bench-price: $(VENV)/.stamp
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS $(BIN)/python benchmarks/price.py

# The tables of the site's benchmark pages use all cores.
bench-tables: $(VENV)/.stamp
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS $(BIN)/python benchmarks/query.py steps memory fidelity

bench-large: $(VENV)/.stamp
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS $(BIN)/python benchmarks/query.py large

# With the Python that it is given; installs nothing.
gpu:
	env -u OMP_NUM_THREADS -u MKL_NUM_THREADS PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) benchmarks/gpu.py $(PART)

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp
	$(BIN)/mypy

format: $(VENV)/.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.stamp
	rm -rf docs/generated docs/auto_examples  # what docs-fast left has no pictures
	$(BIN)/python -m sphinx -W --keep-going -j 1 docs docs/_build/html

docs-fast: $(VENV)/.stamp
	rm -rf docs/generated  # pages of what is gone
	$(BIN)/python -m sphinx -W --keep-going -j 2 -D plot_gallery=0 docs docs/_build/html-fast

dist: $(VENV)/.stamp
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m slow tests/test_package.py

clean:
	rm -rf docs/_build docs/generated docs/auto_examples docs/sg_execution_times.rst .venv* .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
