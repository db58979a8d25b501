# Everything installs into .venv of this clone; uv is used, and installed into .uv where it is missing.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
PYTHON := .venv/bin/python
EXTRAS := text,plots,test,parity,notebooks,bench
INSTALL := $(UV) pip install --quiet --constraint constraints.txt
# One BLAS thread a test worker: two workers share two cores.
export PYTHONUNBUFFERED := 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test check lint newest format clean

demo: .venv/core.stamp
	.venv/bin/jax-moe-lora demo

test: .venv/full.stamp lint
	$(PYTHON) -m pytest -n 2 --dist loadgroup
	$(MAKE) newest

check: .venv/full.stamp lint
	$(PYTHON) -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"

lint: .venv/full.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The suite on the newest jax that installs.
newest: .venv-newest/full.stamp
	.venv-newest/bin/python -m pytest -n 2 --dist loadgroup -m "not gpu and not slow"

format: .venv/full.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .venv-newest .uv

$(UV):
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet uv

.venv/core.stamp: pyproject.toml constraints.txt | $(UV)
	test -x $(PYTHON) || $(UV) venv --quiet .venv
	$(INSTALL) --python $(PYTHON) --editable .
	touch $@

.venv/full.stamp: pyproject.toml constraints.txt | $(UV)
	test -x $(PYTHON) || $(UV) venv --quiet .venv
	$(INSTALL) --python $(PYTHON) --editable ".[$(EXTRAS)]"
	touch .venv/core.stamp $@

.venv-newest/full.stamp: pyproject.toml | $(UV)
	test -x .venv-newest/bin/python || $(UV) venv --quiet .venv-newest
	$(UV) pip install --quiet --upgrade --python .venv-newest/bin/python --editable ".[$(EXTRAS)]"
	touch $@
