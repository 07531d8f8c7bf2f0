# Two commands on a fresh machine: `make sample` prints text, `make test` proves the rest. Each makes .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One more than two cores: tests wait for processes that they start.
WORKERS ?= 3
PROMPT ?= Once upon a time

.PHONY: sample chat test test-fast test-aot bundled lint dev aot notebooks evaluation docs clean

sample: $(VENV)/core
	@$(BIN)/python -m infer.sample --config=configs/sample.py --prompt "$(PROMPT)"

chat: $(VENV)/core
	@$(BIN)/python -m infer.chat --config=configs/chat.py

# Most of its time would be the compiler's: what is tested is what is computed, and parts of .ci/run compile as users do.
test: lint $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --quickly -n $(WORKERS) --dist worksteal --durations 10 -m "not aot" $(ARGS)

# Without the tests that take more than 20 s, compiled as users do unless ARGS=--quickly.
test-fast: $(VENV)/dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not aot" $(ARGS)

# Compiles the real programs for TPU slices and GPUs that are not here.
test-aot: aot
	JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 $(VENV)-aot/bin/python -m pytest -n 2 --dist worksteal -m aot --durations 0 \
	    -rsP tests/aot $(ARGS)

# The model that ships, from nothing: hours on 2 cores; bundled/on_gpu.sh does it in minutes.
bundled: $(VENV)/core
	$(BIN)/python -m bundled.make_data --output build/bundled/data
	$(BIN)/python -m train.main --config=configs/bundled.py:pretrain --workdir=build/bundled/pretrain
	$(BIN)/python -m train.main --config=configs/bundled.py:sft --workdir=build/bundled/sft
	$(BIN)/python -m bundled.publish --run build/bundled/sft --output bundled/checkpoint --overwrite
	$(BIN)/python -m bundled.judge --checkpoint bundled/checkpoint --json bundled/judgement.json --page docs/bundled_model.md \
	    --runs build/bundled/pretrain build/bundled/sft

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

dev: $(VENV)/dev

# The site, in build/site; its builder has an environment of its own.
docs: $(VENV)/core $(VENV)-docs/done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python .ci/docs.py build $(VENV)-docs/bin/mkdocs

# An environment of its own that has everything of the other, too.
define on_top
@test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D)
@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
    echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > "$$($(@D)/bin/python -c "$$site")/core.pth"
endef

# Where libtpu is installed and no TPU is, every start of jax complains: not in the other one.
aot: $(VENV)-aot/done

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

$(VENV)-aot/done: requirements-aot.txt $(VENV)/dev
	$(on_top)
	@$(VENV)-aot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-aot.txt \
	    && touch $@ || echo "the compilers cannot be installed here: what needs them will be skipped" >&2

# The notebooks, run and compared with what is committed; ARGS=--write stores new outputs.
notebooks: $(VENV)-notebooks/done
	$(VENV)-notebooks/bin/python .ci/notebooks.py $(ARGS)

$(VENV)-notebooks/done: requirements-notebooks.txt $(VENV)/dev
	$(on_top)
	@$(VENV)-notebooks/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-notebooks.txt
	@touch $@

# lm-eval's own command line with our model, on local tasks.
evaluation: $(VENV)-eval/done
	JAX_PLATFORMS=cpu $(VENV)-eval/bin/python -m pytest --quickly tests/evaluation/test_evaluate.py $(ARGS)

$(VENV)-eval/done: requirements-eval.txt $(VENV)/dev
	$(on_top)
	@$(VENV)-eval/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-eval.txt
	@touch $@

$(VENV)-docs/done: requirements-docs.txt $(VENV)/core
	@test -x $(VENV)-docs/bin/python || $(BIN)/python -m venv $(VENV)-docs
	@$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis
