# bise: everything a person or CI runs. `make help` lists the targets.
SHELL := /bin/sh
BIN := .venv/bin
BUILD_INPUTS := pyproject.toml tools/build_backend.py $(shell find native -type f 2>/dev/null)
SOURCES := $(shell find src/bise -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null)
# A development install is editable, so it serves `make chat` too.
INSTALLED := $(if $(wildcard .venv/.dev),.venv/.dev,.venv/.run)
CODE := src tests tools recipes benchmarks
.PHONY: help web pictures chat test test-slow test-gpu bench-gpu postgres identities soak load fuzz storm clients check fmt lint types layers budget docs docs-check session bench sanitize kill pull-kill tune-kill wheel clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

chat: $(INSTALLED) ## Chat with the embedded model (ARGS="..." adds arguments; piped input is answered line by line)
	@$(BIN)/bise chat $(ARGS)

test: .venv/.dev ## Run the test suite
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

test-slow: .venv/.dev ## Run the tests that take long, too
	@$(BIN)/python -m pytest -q -m "slow or not slow" --timeout 1800 $(ARGS)

test-gpu: .venv/.dev ## Run the Triton backend's tests on this machine's CUDA device: kernels, identities, a table of errors
	@$(BIN)/python -m pytest -q -s -m "not slow" --timeout 600 tests/kernels/triton tests/equivalence/test_triton_logits.py
	@if ls /dev/nvidia[0-9]* >/dev/null 2>&1; then $(BIN)/python -m pytest -q -m "not slow" --timeout 600 -k triton tests/equivalence/test_identities.py \
	tests/equivalence/test_matrix.py; else echo "no CUDA device here: identities on one wait; the kernels ran in Triton's interpreter"; fi

bench-gpu: .venv/.dev ## Measure everything that issue 8 names on this machine's CUDA device (ARGS="--toy" anywhere)
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

postgres: .venv/.dev ## Run the tests of store, server and assistant on PostgreSQL, too (apt-get install postgresql)
	@$(BIN)/python -m pytest -q -m "slow or not slow" -k postgres --timeout 600 tests/store tests/server tests/assistant

identities: .venv/.dev ## Assert that requests return the same bits however they are computed (all ways; 20 minutes)
	@$(BIN)/python -m pytest -q -m "slow or not slow" --timeout 3600 tests/equivalence/test_matrix.py tests/equivalence/test_identities.py

fuzz: .venv/.dev ## Send 1,800 bad requests and 10,000 random ones to a server, and see that it stays the same
	@$(BIN)/python -m pytest -q -m "slow or not slow" --timeout 1800 tests/contract/test_http_fuzz.py

storm: .venv/.dev ## Let hundreds of clients leave in 14 ways, and see that every slot comes back
	@$(BIN)/python -m pytest -q -m "slow or not slow" --timeout 1800 tests/contract/test_lifetime.py

clients: .venv/.dev ## Drive older clients, litellm and LangChain, each in an environment of its own (needs PyPI)
	@$(BIN)/python tests/contract/old_clients.py

soak: .venv/.dev ## Run 20,000 small requests, 40 % of them aborted: no block lost, memory flat (5 minutes)
	@$(BIN)/python tests/robustness/soak.py $(ARGS)

load: .venv/.dev ## Put 32 and 200 streams, then 1,000 idle connections on a server with the embedded model (3 minutes)
	@$(BIN)/python benchmarks/load.py $(ARGS)

check: .venv/.dev fmt-check lint types layers budget docs-check ## Everything CI checks besides the tests

fmt: .venv/.dev ## Format the code
	@$(BIN)/ruff format -q $(wildcard $(CODE)) && $(BIN)/ruff check -q --fix --select I $(wildcard $(CODE))

fmt-check: .venv/.dev
	@$(BIN)/ruff format --check $(wildcard $(CODE))

lint: .venv/.dev
	@$(BIN)/ruff check $(wildcard $(CODE))

types: .venv/.dev
	@$(BIN)/pyright --pythonpath $(BIN)/python

layers: .venv/.dev
	@$(BIN)/lint-imports --no-cache

budget: .venv/.dev
	@$(BIN)/python tools/budget.py

docs: .venv/.dev ## Regenerate docs/cli.md from --help
	@$(BIN)/python tools/cli_page.py

session: .venv/.dev ## Capture the README's session anew (after a change of the embedded model)
	@$(BIN)/python tools/readme_session.py

pictures: .venv/.dev web ## Take the README's pictures of the assistant anew (needs chromium)
	@$(BIN)/python tools/readme_pictures.py

docs-check: .venv/.dev
	@$(BIN)/python tools/cli_page.py --check

bench: .venv/.dev ## Measure speed beside installed peers, all of docs/bench.md (under 30 minutes)
	@$(BIN)/python benchmarks/run_all.py $(ARGS)

sanitize: .venv/.dev ## Build the native tests with ASan and UBSan and run them
	@sh native/sanitize.sh

kill: .venv/.dev ## Kill the writer of the database 200 times and every migration at every statement
	@$(BIN)/python -m pytest -q -m slow tests/store

pull-kill: .venv/.dev ## Kill a pull from a hub on loopback at 200 random moments; it must end with the same bytes
	@$(BIN)/python -m pytest -q -s -m slow --timeout 1800 tests/hub/test_pull.py

tune-kill: .venv/.dev ## Kill 200 writers of checkpoints and 20 training runs at random moments; all load, all resume bit-equal
	@$(BIN)/python -m pytest -q -m slow --timeout 1800 tests/train

web: ## Check, test and build the assistant's page into the package (node from PyPI where there is none)
	@sh tools/make_web.sh

wheel: .venv/.dev ## Build an sdist and a wheel into dist/, and see that the wheel serves the assistant's page
	@$(BIN)/python tools/check_package.py

clean: ## Remove what the build and the tests left (not .venv)
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis

.venv/.run: $(BUILD_INPUTS) $(SOURCES) tools/make_venv.sh
	@sh tools/make_venv.sh run

.venv/.dev: $(BUILD_INPUTS) tools/make_venv.sh
	@sh tools/make_venv.sh dev
