# Every target sets up what it needs in .venv; nothing is done twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: soak demo serve test test-long lint protos bench pictures clean

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

# What takes too long for every change.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -m long

# Memory growth over 10,000 requests, with the other faults.
soak: $(VENV)/.installed
	SPECTRA_REQUESTS=10000 $(BIN)/python -m pytest tests/test_faults.py --timeout 3600

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos

protos: $(VENV)/.installed
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=clients/python --pyi_out=clients/python \
		protos/vlm_spectra/v1/*.proto

# What the benchmarks compare with is installed for them alone.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/wire.py --rate 100 --rounds 1
	$(BIN)/python benchmarks/clients.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/lens.py

# The pictures of docs/pictures.md, made by the examples on the embedded model in process.
EXAMPLES := quickstart logit_lens attention attribution interventions patching
pictures: $(VENV)/.installed
	mkdir -p build/pictures docs/pictures && cp examples/screenshot.png build/pictures
	cd build/pictures && for name in $(EXAMPLES); do \
		sed 's|^model = .*|model = vs.HookedVLM.from_pretrained("spectra-tiny")|' ../../examples/$$name.py \
			| ../../$(BIN)/python - || exit 1; done
	cd build/pictures && cp patches.png lens.png attention_heads.png attribution.png occlusion.png heads.png cuts.png \
		patching.png patching_image.png ../../docs/pictures

clean:
	rm -rf $(VENV) .venv-client
