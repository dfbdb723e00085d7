# Every target sets up what it needs: a fresh clone, make, git and Python 3.11 to 3.13 are enough.
.DEFAULT_GOAL := help
.PHONY: help setup demo docs check test test-jobs test-faults test-cluster clean
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
SOURCES := data_sharding kd cluster tuning benchmarks tests

help:
	@echo "make demo        the whole job on built-in data: teacher, cache, students alone and distilled, one table"
	@echo "make check test  lint, format, types, import directions; all tests"
	@echo "make test-jobs   jobs on a real local head with token authentication; a comparison killed and resumed"
	@echo "make test-faults every fault once: workers, nodes, driver, head, tracker, disk are lost, the weights stay"
	@echo "make test-cluster ray up, a run on two nodes, ray down: on hosts in network namespaces (root, sshd, PostgreSQL)"
	@echo "make docs        docs/methods.md, from the methods' own files"
	@echo "make setup       only the environment (.venv)"

setup: .venv/.ready

# uv where it is there, else venv and pip; exact versions, bytecode compiled once, by all cores (it halves every
# process start; a few packages hold files of other Pythons, which compile nowhere).
.venv/.ready: requirements.lock
	@test "$$(uname -s)-$$(uname -m)" = Linux-x86_64 || { echo "minnow: this platform ($$(uname -s) $$(uname -m)) \
	is not served: requirements.lock holds wheels for Linux on x86_64"; exit 1; }
	@test -n "$(PYTHON)" || { echo "minnow: no Python 3.11, 3.12 or 3.13 found; install one or set PYTHON=..."; exit 1; }
	@echo "minnow: setting up .venv with $$($(PYTHON) --version) (some minutes and 7 GB, once)"
	@rm -rf .venv
	@if command -v uv >/dev/null 2>&1; then \
		uv venv -q --python "$(PYTHON)" .venv && \
		uv pip install -q --compile-bytecode --no-deps --python $(BIN)/python -r requirements.lock; \
	else \
		"$(PYTHON)" -m venv .venv && $(BIN)/python -m pip install -q --no-deps --no-compile -r requirements.lock && \
		{ $(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true; }; \
	fi
	@touch .venv/.ready

demo: setup
	@$(BIN)/python -m cluster.demo

docs: setup
	$(BIN)/python -m kd.describe docs/methods.md

check: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright
	$(BIN)/lint-imports

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not jobs and not faults and not hosts"

# Minutes on two cores, and Ray's own start is not always punctual: apart from the rest.
test-jobs: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m jobs

# One draw of every fault, some minutes each; MINNOW_FAULT_DRAWS=10 draws ten, MINNOW_FAULTS=worker,driver some.
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults

# Hosts of its own by Linux namespaces; what the machine lacks for that is told as the reason to skip.
test-cluster: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m hosts -rs

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
