# make demo    set everything up and run the whole lifecycle on this machine
# make test    set everything up and run all tests
# make check   lint, types, import directions, and a wheel that installs

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv/bin
DEVICE := .venv-device/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# Tests that need neither torch nor the fleet; they run in both environments.
DEVICE_TESTS := tests/contract tests/device $(wildcard tests/test_*.py)

.PHONY: demo test check lint types wheel venv venv-device venv-device-ort clean

# ENGINE=ort-training runs the agents on onnxruntime-training; DATASET=fsdd learns spoken digits.
ENGINE := step-graph
DATASET := digits
AGENT_VENV := $(if $(filter ort-training,$(ENGINE)),venv-device-ort,venv-device)

demo: venv $(AGENT_VENV)
	$(VENV)/edge-ll demo --engine $(ENGINE) --dataset $(DATASET) $(DEMO_OPTIONS)

test: venv venv-device .venv-device/tests.stamp
	rm -f .coverage .coverage.*
	COVERAGE_FILE=.coverage.server $(VENV)/python -m pytest --cov --cov-report= $(TEST_OPTIONS)
	COVERAGE_FILE=.coverage.device $(DEVICE)/python -m pytest --cov --cov-report= $(DEVICE_TESTS)
	$(VENV)/coverage combine --quiet
	$(VENV)/coverage report --skip-covered --fail-under=85

check: lint types wheel

lint: venv
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/lint-imports

types: venv
	$(VENV)/mypy

wheel: venv
	PYTHON=$(VENV)/python sh tests/smoke/wheel.sh

venv: .venv/ready.stamp

venv-device: .venv-device/ready.stamp

venv-device-ort: .venv-device-ort/ready.stamp

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
	rm -rf .venv .venv-device .venv-device-ort demo-out dist .coverage .coverage.*
