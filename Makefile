# make demo: the whole job on a small model made on the spot.   make test: the test suite.
# Both set up .venv first, with the versions of constraints.txt. PYTHON=... picks an interpreter (3.10 to 3.12).

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM ?= false
# Test files side by side, each with up to three ranks of one thread; what one throw-away Slurm runs comes first, alone.
PROCESSES ?= 2

.PHONY: demo evidence test test-slow lint docs install clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@python=""; for p in $(PYTHON) python3 python3.12 python3.11 python3.10; do \
		if $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "No Python 3.10 to 3.12 found: install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	if ! $$python -m venv $(VENV); then echo "python -m venv failed: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; fi
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and by exact version: an open range in another package would pull another build.
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/warp-ds demo

# Hours on two cores; goes on where it was stopped. benchmarks/evidence.yaml says what is done (PROTOCOL: another file does).
EVIDENCE := $(BIN)/python benchmarks/evidence.py
evidence: $(READY)
	@if [ -z "$(MODEL)" ] || [ -z "$(DATA)" ]; then echo "make evidence MODEL=DIRECTORY DATA=DIRECTORY [OUT=DIRECTORY] [POINTS=FILE] [PROTOCOL=FILE] [DTYPE=bfloat16] [LAUNCHER='torchrun --nproc_per_node 8 -m warp_ds']: a chat model, and the files that the protocol names (docs/evaluation.md)" >&2; exit 2; fi
	$(EVIDENCE) "$(or $(PROTOCOL),benchmarks/evidence.yaml)" --model "$(MODEL)" --data "$(DATA)" --out "$(or $(OUT),checkpoints/evidence)" $(if $(POINTS),--points "$(POINTS)") $(if $(DTYPE),--dtype "$(DTYPE)") $(if $(LAUNCHER),--launcher "$(LAUNCHER)")

test: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -rs -m "not slow" tests/slurm
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -rs -m "not slow" -n $(PROCESSES) --dist loadfile --ignore tests/slurm

test-slow: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -rs -m slow tests/slurm
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -rs -m slow -n $(PROCESSES) --dist loadfile --ignore tests/slurm

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	# Scripts are checked for what no longer fits the package, not for how they hold their own tables.
	$(BIN)/mypy benchmarks examples $(addprefix --disable-error-code ,arg-type operator misc var-annotated index assignment union-attr dict-item return-value)

# Any warning is an error: links and anchors within the site are checked, docstrings too.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info build
