# Every target sets up what it needs in .venv; nothing is done twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: fuzz soak demo serve test test-long lint protos bench pictures clean

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

# Fifty clients for ten minutes, compared, cut off and killed; writes docs/soak.md.
soak: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m soak --page docs/soak.md

# 100,000 requests of any bytes at every call; blocks that went well (build/fuzz.jsonl) are not done again.
fuzz: $(VENV)/.installed
	SPECTRA_FUZZ=100000 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_typescript.py -k "fuzz or corpus"

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
	$(BIN)/python benchmarks/in_process.py
	$(BIN)/python benchmarks/wire.py
	$(BIN)/python benchmarks/wire.py --rate 1000 --delay 20 --rounds 2
	$(BIN)/python benchmarks/wire.py --rate 100 --delay 20 --rounds 0
	$(BIN)/python benchmarks/slow_link.py
	$(BIN)/python benchmarks/patterns.py
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
