# make demo    set everything up and run the whole lifecycle on this machine
# make test    set everything up and run all tests
# make check   lint, types, import directions, and a wheel that installs
# make bench-engines   measure the training engines; QUICK=1 for a first look

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv/bin
DEVICE := .venv-device/bin
OLDEST := .venv-device-oldest/bin
OPENVINO := .venv-openvino/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# Tests that need neither torch nor the fleet; they run in both environments.
DEVICE_TESTS := tests/contract tests/device $(wildcard tests/test_*.py)

# What depends on the runtime itself; runs on the oldest supported one and on other providers too.
RUNTIME_TESTS := tests/contract/test_providers.py tests/test_engine_runtime.py

.PHONY: demo test test-runtimes check lint types wheel bench-engines clean
.PHONY: venv venv-device venv-device-ort venv-device-oldest venv-openvino venv-bench-onnxsim

# ENGINE=ort-training runs the agents on onnxruntime-training; DATASET=fsdd learns spoken digits.
ENGINE := step-graph
DATASET := digits
AGENT_VENV := $(if $(filter ort-training,$(ENGINE)),venv-device-ort,venv-device)

demo: venv $(AGENT_VENV)
	$(VENV)/edge-ll demo --engine $(ENGINE) --dataset $(DATASET) $(DEMO_OPTIONS)

test: venv venv-device .venv-device/tests.stamp test-runtimes
	rm -f .coverage .coverage.*
	COVERAGE_FILE=.coverage.server $(VENV)/python -m pytest --cov --cov-report= $(TEST_OPTIONS)
	COVERAGE_FILE=.coverage.device $(DEVICE)/python -m pytest --cov --cov-report= $(DEVICE_TESTS)
	$(VENV)/coverage combine --quiet
	$(VENV)/coverage report --skip-covered --fail-under=85

# torch's tails are exported here, for the other environments have no torch.
test-runtimes: venv venv-device-oldest venv-openvino
	rm -rf .venv-openvino/students
	$(VENV)/python -m tests.provider_students .venv-openvino/students
	EDGE_LL_STUDENTS=.venv-openvino/students \
		$(OLDEST)/python -m pytest -q tests/contract/test_engine.py $(RUNTIME_TESTS)
	EDGE_LL_STUDENTS=.venv-openvino/students EDGE_LL_PROVIDER=openvino \
		$(OPENVINO)/python -m pytest -q $(RUNTIME_TESTS)

check: lint types wheel

lint: venv
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/lint-imports

types: venv
	$(VENV)/mypy

wheel: venv
	PYTHON=$(VENV)/python sh tests/smoke/wheel.sh

# QUICK=1 takes about a minute instead of ten.
bench-engines: venv venv-device venv-device-ort venv-bench-onnxsim
	$(VENV)/python -m benchmarks.engines $(if $(QUICK),$(BENCH_QUICK)) $(BENCH_OPTIONS)

BENCH_QUICK := --tails linear pointwise --batches 16 --threads 2 --rounds 5 --memory-steps 200 --long-steps 0 --no-int8

venv: .venv/ready.stamp

venv-device: .venv-device/ready.stamp

venv-device-ort: .venv-device-ort/ready.stamp

venv-bench-onnxsim: .venv-bench-onnxsim/ready.stamp

venv-device-oldest: .venv-device-oldest/ready.stamp

venv-openvino: .venv-openvino/ready.stamp

# One pip call each: the resolver then sees every requirement at once.
.venv/ready.stamp: pyproject.toml
	$(call make_venv,.venv)
	$(VENV)/python $(PIP_INSTALL) -e ".[export,fleet,dev]"
	touch $@

.venv-device/ready.stamp: pyproject.toml
	$(call make_venv,.venv-device)
	$(DEVICE)/python $(PIP_INSTALL) -e ".[device]"
	touch $@

.venv-device-ort/ready.stamp: pyproject.toml
	$(call make_venv,.venv-device-ort)
	.venv-device-ort/bin/python $(PIP_INSTALL) -e ".[device-ort-training]"
	touch $@

# The peer of the benchmark, on the very runtime that the step graph has.
.venv-bench-onnxsim/ready.stamp: .venv-device/ready.stamp
	$(call make_venv,.venv-bench-onnxsim)
	.venv-bench-onnxsim/bin/python $(PIP_INSTALL) onnxsim==0.8.1 \
		$$($(DEVICE)/python -m pip freeze | grep -E '^(onnxruntime|numpy)==')
	touch $@

# The lower bounds of pyproject.toml, as far as they have wheels for this Python.
.venv-device-oldest/ready.stamp: pyproject.toml
	$(call make_venv,.venv-device-oldest)
	$(OLDEST)/python $(PIP_INSTALL) -e ".[device,test]" onnxruntime==1.20.1 numpy==1.26.4
	touch $@

.venv-openvino/ready.stamp: pyproject.toml
	$(call make_venv,.venv-openvino)
	$(OPENVINO)/python $(PIP_INSTALL) -e ".[device-openvino,test]"
	touch $@

.venv-device/tests.stamp: .venv-device/ready.stamp
	$(DEVICE)/python $(PIP_INSTALL) -e ".[device,test]"
	touch $@

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "error: Python's venv is missing; run: sudo apt install python3-venv"; exit 1; }
	@echo "installing into $(1); the first time takes some minutes"
	$(PYTHON) -m venv $(1)
endef

clean:
	rm -rf .venv .venv-device .venv-device-ort .venv-device-oldest .venv-openvino
	rm -rf .venv-bench-onnxsim demo-out dist .coverage .coverage.*
