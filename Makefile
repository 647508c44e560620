# make setup        .venv with everything in requirements.txt
# make quickstart   four arms on the embedded digits: grids, convergence.png, table of speedups
# make test         all tests

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DIGITS := data/digits
RUNS := runs/quickstart

.PHONY: setup quickstart test
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --requirement requirements.txt
	touch $@

quickstart: setup
	$(RUN) -m dataset.prepare digits --out $(DIGITS)
	$(RUN) -m dataset.standin_encoder $(DIGITS) --out $(DIGITS)/encoder
	$(RUN) -m dataset.prepare digits --out $(DIGITS) --encoder $(DIGITS)/encoder
	$(RUN) train_repa_dar.py --config digits --out $(RUNS)/residual
	$(RUN) train_repa_dar.py --config digits --out $(RUNS)/dar --routing dar
	$(RUN) train_repa_dar.py --config digits --out $(RUNS)/residual-repa --alignment repa
	$(RUN) train_repa_dar.py --config digits --out $(RUNS)/dar-repa --routing dar --alignment repa
	$(RUN) -m eval.convergence $(RUNS)/residual $(RUNS)/dar $(RUNS)/residual-repa $(RUNS)/dar-repa --out $(RUNS)/convergence

test: setup
	$(RUN) -m pytest -q --durations=15 tests
