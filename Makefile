# Every target that needs an environment makes it first (about 7 GB in ~/.cache, once per machine).
# COMFYUI_PATH=/path/to/ComfyUI uses an existing ComfyUI and its Python instead.
# ARGS goes to the command of the target, e.g. make test ARGS="tests/unit -k em".

PYTHON3 ?= python3
BOOTSTRAP = $(PYTHON3) -m tools.bootstrap
PYTHON = "$$($(BOOTSTRAP) which-python)"
ARGS ?=

.PHONY: help setup setup-tests demo test serve bench soak lint which-python

help:  ## show this list
	@sed -n 's/^\([a-z3-]*\):.*##  *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup:  ## make the environment: ComfyUI, torch, clips
	@$(BOOTSTRAP) setup

setup-tests:
	@$(BOOTSTRAP) setup --tests

demo: setup  ## run STEM inversion end to end; see output/demo/
	@$(PYTHON) -m tools.demo $(ARGS)

test: setup-tests  ## run all tests; those of the front end where chromium is installed
	@$(PYTHON) -m pytest -c tests/pytest.ini $(ARGS) $(if $(filter tests%,$(ARGS)),,tests)

serve: setup  ## run ComfyUI with the pack on 127.0.0.1:8188
	@$(PYTHON) -m tools.server $(ARGS)

bench: setup  ## measure the inversion methods on a few clips
	@$(PYTHON) -m tools.bench inversion --quick $(ARGS)

soak: setup  ## 300 mixed runs on one server: memory, equal results, nothing stuck
	@$(PYTHON) -m tools.soak $(ARGS)

lint: setup-tests  ## check style, formatting and security
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m bandit --quiet --configfile pyproject.toml --recursive __init__.py nodes stem

which-python:  ## print the Python of the environment
	@$(BOOTSTRAP) which-python
