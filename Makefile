# `make help` lists every command. Everything below works from a fresh clone: `.venv` is made on first use.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
STAMP := .venv/.installed
PYPROJECTS := kernels/pyproject.toml runtime/pyproject.toml operator/pyproject.toml

.PHONY: help dev requirements generate lint test test-engine test-cluster test-aot test-gpu bench-kernels bench-engine mutants cluster-up cluster-down demo demo-down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

dev: $(STAMP) ## make .venv: the three distributions in editable form, the CPU engine, the test tools

$(STAMP): requirements/dev.txt $(PYPROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@missing=; $(PYTHON) -c 'import ensurepip' 2>/dev/null || missing=python3-venv; \
	/sbin/ldconfig -p | grep -q libnuma.so.1 || missing="$$missing libnuma1"; \
	[ -z "$$missing" ] || { echo "installing Debian packages: $$missing"; \
	  apt-get update -q && apt-get install -yq --no-install-recommends $$missing; }
	[ -x $(BIN)/uv ] || $(PYTHON) -m venv --clear .venv
	[ -x $(BIN)/uv ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --quiet -e kernels -e runtime -e operator
	@touch $@

requirements: ## compile the pins with hashes from requirements/*.in
	@for f in requirements/*.in; do \
	  uv pip compile --quiet --generate-hashes --no-emit-index-url --python-version 3.11 --python-platform x86_64-manylinux_2_34 \
	    --override requirements/overrides.txt $$f -o $${f%.in}.txt; done

generate: dev ## write the CRD in crds/ and in the chart, and the tables of docs/api.md, from the API types
	$(BIN)/python -m turboquant_operator.api.crd
	$(BIN)/python -m turboquant_operator.api.reference

lint: dev ## formatter, linter, types, import contracts, shell scripts
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $$(git grep -lE '^(#!.*bash|# shellcheck shell=bash)' -- .ci tests)

test: lint ## all tests that need no GPU, cluster or engine
	$(BIN)/python -m pytest -m "not engine and not cluster and not gpu" $(PYTEST_ARGS)

test-engine: dev ## the CPU engine's tests
	$(BIN)/python -m pytest -m engine $(PYTEST_ARGS)

test-cluster: dev ## the operator against a real API server, and the demo as a test
	$(BIN)/python -m pytest -m cluster $(PYTEST_ARGS)

test-aot: dev ## every listed kernel variant, compiled for sm_80, sm_89, sm_90, sm_100 and sm_120; needs no GPU
	$(BIN)/python kernels/tests/aot/resources.py --all $(AOT_ARGS)

test-gpu: dev ## kernels, and the engine where vLLM's CUDA build is installed, on this machine's GPU; writes kernels/tests/gpu/result.json
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

bench-kernels: dev ## the kernels' speed beside FlashAttention-3 and vLLM's; writes docs/benchmarks
	$(BIN)/tq bench kernels

bench-engine: dev ## whole engines beside each other, GROUP="decode prefill"; writes docs/benchmarks
	$(BIN)/tq bench engine $(foreach group,$(GROUP),--group $(group))

mutants: dev ## named mutations of codec and byte counts, each of which a test must catch
	$(BIN)/python tests/mutants.py

cluster-up: ## bring the local one-node Kubernetes cluster up
	tests/cluster/up

cluster-down: ## take it down and leave nothing behind
	tests/cluster/down

demo: ## everything once: cluster, images, operator, a model on a compressed cache, an answer
	tests/e2e/demo up

demo-down: ## take the demo and its cluster down
	tests/e2e/demo down

clean: ## remove .venv and caches of this checkout
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
