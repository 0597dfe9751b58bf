# Each target sets itself up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(abspath $(VENV))/bin
# On PATH: ninja and accelerate, which are started by name.
RUN := PATH="$(BIN):$$PATH"

.PHONY: demo test lint sharding speed chip gpt2 instructions memory step-memory quality tasks tasks-data changeover faults eight-billion docs
.PHONY: packages format clean

demo: $(VENV)/.installed
	$(RUN) python benchmarks/demo.py $(ARGS)

test: lint
	$(RUN) python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS)

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy novoscale integrations
	$(RUN) lint-imports

sharding: $(VENV)/.rivals
	$(RUN) python benchmarks/sharding.py $(ARGS)

speed: $(VENV)/.installed
	$(RUN) python benchmarks/speed.py $(ARGS)

chip: $(VENV)/.installed
	$(RUN) python benchmarks/chip.py $(ARGS)

gpt2: $(VENV)/.installed
	$(RUN) python benchmarks/gpt2.py $(ARGS)

instructions: $(VENV)/.installed
	$(RUN) python benchmarks/instructions.py $(ARGS)

quality: $(VENV)/.rivals
	$(RUN) python benchmarks/quality.py $(ARGS)

tasks: $(VENV)/.tasks
	$(RUN) python -m benchmarks.tasks $(ARGS)

# With apt-get and npm, into ~/.cache/novoscale/tasks; nothing is installed.
tasks-data: $(VENV)/.tasks
	$(RUN) python -m benchmarks.tasks.data

changeover: $(VENV)/.installed
	$(RUN) python benchmarks/changeover.py $(ARGS)

memory: $(VENV)/.rivals
	$(RUN) python benchmarks/memory.py $(ARGS)

step-memory: $(VENV)/.rivals
	$(RUN) python benchmarks/step_memory.py $(ARGS)

eight-billion: $(VENV)/.installed
	$(RUN) python benchmarks/eight_billion.py $(ARGS)

faults: $(VENV)/.installed
	$(RUN) python benchmarks/faults.py $(ARGS)

# Needs no network, nor does the site, in build/site. To search in it: python -m http.server --directory build/site
docs: $(VENV)/.docs
	$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict $(ARGS)

# A wheel and an sdist in empty environments, without and with each extra.
packages: $(VENV)/.installed
	$(RUN) python tests/packages.py $(ARGS)

format: $(VENV)/.installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tests]'
	touch $@

$(VENV)/.rivals: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[rivals]'
	touch $@

$(VENV)/.tasks: $(VENV)/.rivals
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tasks]'
	touch $@

# Not by way of .installed: the docs extra is enough.
$(VENV)/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
