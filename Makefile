# The same verbs locally and in CI. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
export INPUT

.PHONY: help setup demo test check lint soak bench

help:
	@echo 'make setup   virtual environment with our packages'
	@echo 'make demo    set up, then review a bill of materials; INPUT=my-bom.json or INPUT=env; ARGS="--deny"'
	@echo 'make test    set up, then everything that must pass (also: make check)'
	@echo 'make lint    the part of make test without the tests'
	@echo 'make soak    make test, with the long tests at full length'
	@echo 'make bench   what the promises of speed measure; ARGS="--json"'

setup:
	@"$(PYTHON)" dev/setup.py

demo: setup
	@.venv/bin/plm-cli demo $${INPUT:+--input "$$INPUT"} $(ARGS)

test check:
	@"$(PYTHON)" dev/setup.py --dev
	@.venv/bin/python dev/check.py $(ARGS)

lint:
	@"$(PYTHON)" dev/setup.py --dev
	@.venv/bin/python dev/check.py --only guardrails

soak:
	@"$(PYTHON)" dev/setup.py --dev
	@SOAK=1 .venv/bin/python dev/check.py $(ARGS)

bench:
	@"$(PYTHON)" dev/setup.py --dev
	@for script in bench/*.py; do echo "$$script"; .venv/bin/python "$$script" $(ARGS) || exit 1; done
