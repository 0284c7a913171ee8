PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test

demo: .venv/ready
	$(BIN)/python sample.py

test: .venv/ready-dev
	$(BIN)/python -m pytest -q

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
