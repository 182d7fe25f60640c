# Every target makes .venv by itself; nothing is installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two files of tests at a time, in the order of tests/conftest.py; more would stretch the waits that some tests measure.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install install-dev quickstart test parity parity-of-ranks parity-of-faults faults faults-page slurm-lab slurm-lab-down test-slurm lint bench-loss bench-engines bench-checkpoint bench-data bench-laws bench objectives study clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch first and alone, so that what follows is resolved against this build of it. On a machine without a GPU an index that
# serves the CPU build saves gigabytes: PIP_EXTRA_INDEX_URL is honoured.
$(VENV)/.torch: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	touch $@

$(VENV)/.installed: $(VENV)/.torch requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

install: $(VENV)/.installed       ## make .venv and install requirements.txt

install-dev: $(VENV)/.installed-dev

quickstart: install               ## real text -> shards -> training on 2 ranks -> resume -> samples -> plot
	$(BIN)/python -m pretrain quickstart

test: install-dev                 ## the tests; `make parity` runs the heavier ones
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not parity" $(SIDE_BY_SIDE) --ignore tests/distributed --ignore tests/slurm
	$(BIN)/python -m pytest -m "not parity" tests/distributed
	$(BIN)/python -m pytest tests/slurm

parity: install-dev              ## every parity cell and planted fault, the heavier proofs; rewrites docs/parity.md
	$(BIN)/python -m tests.distributed.parity_table
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m parity $(SIDE_BY_SIDE) --ignore tests/distributed --ignore tests/slurm
	$(BIN)/python -m pytest -m parity tests/distributed

# What of it fits into a check of every change: all cells, an eighth of the planted faults, the proofs on several ranks.
parity-of-ranks: install-dev
	$(BIN)/python -m tests.distributed.parity_table --every 8
	$(BIN)/python -m pytest -m parity tests/distributed

parity-of-faults: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "parity and fault" $(SIDE_BY_SIDE) --ignore tests/distributed --ignore tests/slurm

# The lab is started by slurm-lab and stays until slurm-lab-down: its tests are part of `make test` where it runs.
slurm-lab: install-dev           ## install (Debian, root) and start a real Slurm of four nodes on this machine's loopback
	$(BIN)/python -m tests.slurm.lab up

slurm-lab-down: install-dev      ## stop it
	$(BIN)/python -m tests.slurm.lab down

test-slurm: slurm-lab            ## training, preemption, requeues, lost nodes and arrays on that Slurm
	$(BIN)/python -m pytest tests/slurm

faults: slurm-lab                ## inject every fault; rewrites docs/faults.md from what the tests found
	$(BIN)/python -m pytest -m fault
	$(BIN)/python -m tests.faults

faults-page: install-dev         # docs/faults.md from tests that have run already
	$(BIN)/python -m tests.faults

lint: install-dev                 ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench-loss: install               ## the loss beside its rivals, one table
	$(BIN)/python bench/loss.py

bench-engines: install            ## engines and layouts beside plain DDP: time, bytes, an engine's own overhead
	$(BIN)/python bench/engines.py

bench-checkpoint: install         ## seconds and extra memory of a save, beside torch.save
	$(BIN)/python bench/checkpoint.py

bench-laws: install               ## planted scaling laws: how often a 95 % interval holds the truth, of 100 noisy studies
	$(BIN)/python bench/laws.py --trials 100

bench: bench-loss bench-engines bench-checkpoint bench-data bench-laws  ## all of them

# litdata lives in an environment of its own, which borrows torch and numpy from .venv: what it would install beside is not ours.
.venv-litdata/.installed: $(VENV)/.installed
	$(PYTHON) -m venv .venv-litdata
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-litdata/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth
	-.venv-litdata/bin/pip install --quiet --disable-pip-version-check --no-deps litdata==0.2.76 lightning-utilities==0.15.3 \
		tifffile==2026.3.3 boto3==1.44.5 botocore==1.44.5 s3transfer jmespath obstore==0.12.1
	touch $@

bench-data: install .venv-litdata/.installed  ## reading, the whole pipeline, prepare and a large index, beside others
	$(BIN)/python bench/data.py --litdata .venv-litdata/bin/python
	$(BIN)/python bench/prepare.py
	$(BIN)/python bench/index.py

objectives: install               ## every objective on the same text, model and compute: a figure and a table
	test -d runs/stdlib || $(BIN)/python -m pretrain prepare --source stdlib --out runs/stdlib --vocab-size 512 --val-fraction 0.03
	$(BIN)/python bench/objectives.py

study: install                    ## a real scaling-law study on two cores: plan, run, fit, report
	test -d runs/stdlib || $(BIN)/python -m pretrain prepare --source stdlib --out runs/stdlib --vocab-size 512 --val-fraction 0.03
	$(BIN)/python -m pretrain study plan configs/study_stdlib.yaml
	$(BIN)/python -m pretrain study run configs/study_stdlib.yaml
	$(BIN)/python -m pretrain study fit runs/studies/stdlib
	$(BIN)/python -m pretrain study report runs/studies/stdlib

clean:                            ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .venv-litdata .pytest_cache .ruff_cache
