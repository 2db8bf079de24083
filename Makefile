# Every target sets up what it needs in .venv; nothing is done twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo serve test lint protos bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[server,web,dev]'
	touch $@

# A laptop's environment: the base install alone, no PyTorch.
.venv-client/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-client
	.venv-client/bin/pip install --quiet --editable .
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

serve: $(VENV)/.installed
	$(BIN)/vlm-spectra serve --model spectra-tiny

test: $(VENV)/.installed .venv-client/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos

protos: $(VENV)/.installed
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=clients/python --pyi_out=clients/python \
		protos/vlm_spectra/v1/*.proto

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/stream.py

clean:
	rm -rf $(VENV) .venv-client
