# Everything installs into .venv of this clone; uv is used, and installed into .uv where it is missing.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
PYTHON := .venv/bin/python
EXTRAS := text,chat,plots,tensorboard,wandb,test,parity,notebooks,bench,docs
JAX := $(shell sed -n 's/^jax==//p' constraints.txt)
INSTALL := $(UV) pip install --quiet --constraint constraints.txt
# One BLAS thread a test worker: two workers share two cores.
export PYTHONUNBUFFERED := 1
# tests/conftest.py puts the longest groups of tests first; xdist would put those of the most tests first.
WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder
QUICK := $(WORKERS) -m "not slow and not parity and not gpu"
export HF_HUB_OFFLINE := 1

.PHONY: demo t test full check quick lint newest format docs clean

demo: .venv/core.stamp
	.venv/bin/jax-moe-lora demo

# The quick tests of what this branch changes, and of what imports it.
t: .venv/full.stamp
	@tests="$$($(PYTHON) tests/support/affected.py)" || exit 1; \
	if [ -z "$$tests" ]; then echo "Nothing has changed since the merge base."; exit 0; fi; \
	$(PYTHON) -m pytest $(QUICK) $$tests || [ $$? -eq 5 ]  # 5: all of them are slow ones

# Environments are set up side by side: that is waiting for downloads. Lint runs beside the tests: mypy has one process.
test:
	$(MAKE) --jobs=4 .venv/full.stamp .venv-cuda13/full.stamp .venv-cuda12/full.stamp .venv-newest/full.stamp
	$(MAKE) --jobs=2 lint full
	$(MAKE) newest

full: .venv/full.stamp .venv-cuda13/full.stamp .venv-cuda12/full.stamp
	$(PYTHON) -m pytest $(WORKERS) --durations=20

# Lint takes one core, for as long as the tests take the other.
check: .venv/full.stamp
	$(MAKE) --jobs=2 lint quick

quick: .venv/full.stamp
	$(PYTHON) -m pytest $(QUICK)

lint: .venv/full.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# On the newest jax that installs: what touches jax's API (kernels, gradients, export, attention, modules, serving). The
# rest is numpy and Python, or runs the same functions on more values.
NEWEST := tests/jax_moe_lora/models/test_attention.py \
	tests/jax_moe_lora/adapters/test_bank.py \
	tests/jax_moe_lora/layer/test_contracts.py \
	tests/jax_moe_lora/layer/test_dense.py \
	tests/jax_moe_lora/layer/test_nn.py \
	tests/jax_moe_lora/serving/test_export_trees.py \
	tests/jax_moe_lora/serving/test_generate.py \
	tests/pallas_kernels/test_backend.py \
	tests/pallas_kernels/test_public_ops.py \
	tests/pallas_kernels/dispatch/test_dispatch.py \
	tests/pallas_kernels/grouped_lora/test_interpreted_gradients.py \
	tests/pallas_kernels/grouped_matmul/test_interpreted.py \
	tests/pallas_kernels/lora_steps/test_lora_steps.py \
	tests/pallas_kernels/plan/test_interpreted.py
newest: .venv-newest/full.stamp
	.venv-newest/bin/python -m pytest $(WORKERS) -m "(not slow or newest) and not gpu" --durations=20 $(NEWEST)

format: .venv/full.stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/full.stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-newest .venv-cuda12 .venv-cuda13 .uv .jax_cache

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

# Compile for a GPU without one: jax's plugin and the CUDA compiler, of one CUDA version each.
.venv-cuda13/full.stamp: CUDA = 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
	'nvidia-nvjitlink==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cuda-cupti==13.0.*'
.venv-cuda12/full.stamp: CUDA = nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-nvjitlink-cu12 \
	nvidia-cuda-nvrtc-cu12 nvidia-cuda-cupti-cu12
.venv-cuda%/full.stamp: pyproject.toml constraints.txt | $(UV)
	test -x .venv-cuda$*/bin/python || $(UV) venv --quiet .venv-cuda$*
	$(INSTALL) --python .venv-cuda$*/bin/python --editable . $(CUDA) \
		"jax-cuda$*-plugin==$(JAX)" "jax-cuda$*-pjrt==$(JAX)"
	touch $@
