# Everything needs only Python (3.11 or newer) and git; each target installs what it uses into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help test check format demo run bench test-cluster lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(STAMP): requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest --numprocesses 4 --dist worksteal  # they mostly wait

check: $(STAMP) ## Lint, types, import contracts, manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/test_deploy.py tests/test_admission.py

format: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP) ## Stream a few commands through the HTTP interface of the dev mode
	$(BIN)/python tests/demo.py

run: $(STAMP) ## Run the dev mode until Ctrl-C
	$(BIN)/session-proxy dev

bench: $(STAMP) ## Measure beside a bare websocket exec (stand-in by default, a real cluster with KUBECONFIG)
	$(BIN)/python tests/benchmarks/bench.py

test-cluster: $(STAMP) ## Run the tests that need the real cluster KUBECONFIG names
	@test -n "$$KUBECONFIG" || { echo "make test-cluster: set KUBECONFIG to a cluster whose administrator you are" >&2; exit 2; }
	$(BIN)/python -m pytest -m cluster tests/cluster

lock: ## Bring the lock files up to date
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -o requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --group dev -o requirements-dev.lock pyproject.toml

clean: ## Remove everything that is made here
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
