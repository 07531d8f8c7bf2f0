# Two commands on a fresh machine: `make sample` prints text, `make test` proves the rest. Each makes .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PROMPT ?= Once upon a time

.PHONY: sample test test-fast lint dev clean

sample: $(VENV)/core
	@$(BIN)/python -m infer.sample --config=configs/sample.py --prompt "$(PROMPT)"

test: lint $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10 $(ARGS)

# Without the tests that take more than 20 s.
test-fast: $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

dev: $(VENV)/dev

$(VENV)/core: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("llama_jax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@echo "installing into $(VENV) (a minute or two)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/core
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis
