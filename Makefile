# Two commands: `make demo` goes from nothing to a report on simulated CLEVRER; `make test` runs every test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# Two workers suit two cores; a file of tests stays on one of them, in the order of tests/conftest.py.
ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: demo test lint install clean

demo: $(INSTALLED)
	PATH="$(BIN):$$PATH" "$(BIN)/dvc" repro
	"$(BIN)/clevrcast" results

test: $(INSTALLED)
	PATH="$(BIN):$$PATH" "$(BIN)/python" -m pytest $(ARGS)

lint: $(INSTALLED)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/pyright"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "clevrcast needs Python 3.11 or newer, found $$("$(PYTHON)" --version): run make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	"$(BIN)/python" -m pip install --quiet --upgrade -c constraints.txt pip
	@echo "installing packages (about 7 GB with PyTorch's CUDA libraries, a few minutes)"
	"$(BIN)/python" -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .work artifacts .dvc/cache .dvc/tmp
