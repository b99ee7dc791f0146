# Everything a person does with this repository. `make help` lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := libs/sdk libs/common services/registry services/rollout services/monitor services/gateway services/worker
MODULES := lepton lepton_common lepton_registry lepton_rollout lepton_monitor lepton_gateway lepton_worker
TESTS := $(addsuffix /tests,$(PACKAGES)) tests

# Some images set it. Without bytecode every process compiles its sources again, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test check audit format bench proto up down

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready .kafka/.ready ## make .venv with everything pinned, and fetch Kafka's jars (repeatable)

$(VENV)/.ready: constraints.txt pyproject.toml $(addsuffix /pyproject.toml,$(PACKAGES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt \
		$(foreach package,$(PACKAGES),-e $(package)) -r requirements-dev.txt
	touch $@

.kafka/.ready: libs/sdk/lepton/kafka_jars.py libs/sdk/lepton/kafka.py | $(VENV)/.ready
	$(BIN)/python -m lepton.kafka_jars .kafka/libs && touch $@

quickstart: setup ## train a model, push it, serve it, call it; leaves the platform running
	$(BIN)/python examples/digits/quickstart.py

test: setup ## every test, on the real Kafka, PostgreSQL, etcd, Envoy and onnxruntime
# One process more than there are cores: a third of their time is waiting. In the order of `testpaths`.
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: setup ## lint, format, types, import contracts and bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p ,$(MODULES))
	$(BIN)/mypy --explicit-package-bases $(wildcard $(TESTS)) benchmarks examples conftest.py
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive libs services examples

audit: $(VENV)/audit/.ready ## ask PyPI which of the pinned packages have known vulnerabilities (needs the network)
	$(VENV)/audit/bin/python .ci/audit.py constraints.txt

# pip-audit brings packages that nothing else here needs.
$(VENV)/audit/.ready: constraints.txt | $(VENV)/.ready
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip-audit
	touch $@

format: setup ## put the code into the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure the serving path beside onnxruntime, MLServer, LitServe and Triton
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.serving_grpc

proto: setup ## generate the gateway's messages from inference.proto
	cd services/gateway/lepton_gateway && $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. inference.proto
# A pool of its own: other clients' messages in the same process have the same names.
	sed -i 's/_descriptor_pool.Default()/_descriptor_pool.DescriptorPool()/' services/gateway/lepton_gateway/inference_pb2.py

up: setup ## start the whole platform on this machine, in the background
	$(BIN)/lepton up --detach

down: ## stop it again; its data stays
	$(BIN)/lepton down
