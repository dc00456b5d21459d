# make quickstart   install and run the whole workflow on generated slides (report in ./quickstart)
# make test         install and run the tests
# make drills       install and run the fault drills: kill -9 and resume, servers that go away
# make lint         style and types
PYTHON ?= $(shell command -v python3.11 || command -v python3.12)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= quickstart
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test drills lint format install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing into $(VENV) (PyTorch with CUDA is large: about 7 GB, a few minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip check
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/cytoray quickstart --out $(OUT) --resume

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not drill"

drills: $(VENV)/.installed
	$(BIN)/python -m pytest -m drill

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
