# Two commands for a newcomer: `make demo` and `make test`. Both build .venv from the lock file first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/onenet-worker
LOCK := requirements/dev.lock
STAMP := $(VENV)/.installed
BENCH_LOCK := requirements/bench.lock
BENCH_STAMP := $(VENV)/.bench-installed
RELEASE_LOCK := requirements/release.lock
RELEASE_STAMP := $(VENV)/.release-installed

.DEFAULT_GOAL := help
.PHONY: help demo test matrix pythons containers memory chaos fuzz bench lint docs asyncapi format lock audit sbom dist clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(STAMP) ## a few hundred commands, good and bad, through the real worker
	@[ -n "$$AMQP_URL" ] || $(BIN)/python -m scripts.services rabbitmq
	@$(RUN) demo

test: $(STAMP) ## every test but those of the image, on a real broker that is found or started by itself
	@scripts/test $(BIN)/python $(PYTEST_ARGS)

TEST_RABBITMQ_IMAGES ?= rabbitmq:3.10-management rabbitmq:4.0-management

matrix: $(STAMP) ## tests/integration and tests/chaos on each of TEST_RABBITMQ_IMAGES, in a Docker engine
	@$(BIN)/python -c "import docker; docker.from_env().ping()" 2>/dev/null || \
		{ echo "make: no Docker engine answers, and only there can other versions be had" >&2; exit 1; }
	@for image in $(TEST_RABBITMQ_IMAGES); do \
		echo "on $$image:"; \
		env -u AMQP_URL TEST_RABBITMQ_IMAGE=$$image scripts/test $(BIN)/python tests/integration tests/chaos $(PYTEST_ARGS) \
			|| exit; \
	done

PYTHONS ?= 3.11 3.12 3.13 3.14

pythons: ## tests that need no server, on each of PYTHONS that is here, or in a Docker engine
	@scripts/test-pythons $(PYTHONS)

containers: $(STAMP) ## the image, the compose file and the alerts, in a Docker engine
	@docker version >/dev/null 2>&1 || { echo "make: no Docker engine answers; start one first (docker version says more)" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/containers --ignore tests/containers/test_memory.py $(PYTEST_ARGS)

memory: $(STAMP) ## the image with 128 MiB under each attack, in a Docker engine; a quarter of an hour or more
	@docker version >/dev/null 2>&1 || { echo "make: no Docker engine answers; start one first (docker version says more)" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/containers/test_memory.py $(PYTEST_ARGS)

chaos: $(STAMP) ## an hour of faults: storms, a cluster, Sentinels, two versions, a soak; CHAOS_ARGS="--runs hang --seed 7"
	@$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

FUZZ_SECONDS ?= 600

fuzz: $(STAMP) ## six fuzz targets of FUZZ_SECONDS each, an hour in all; FUZZ_ARGS="--targets broker --seed 7"
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

bench: $(BENCH_STAMP) ## this worker beside a comparison, a quarter of an hour; BENCH_ARGS=--quick only sees that it works
	@$(BIN)/python -m bench $(BENCH_ARGS)

lint: $(STAMP) ## ruff, mypy, the import contracts, spelling, and the workflow files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

docs: $(STAMP) ## write docs/contracts, the tables in the documents, and the picture of the demo, again from the code
	$(RUN) schema command >docs/contracts/command.schema.json
	$(RUN) schema reply >docs/contracts/reply.schema.json
	$(RUN) schema result >docs/contracts/result.schema.json
	$(RUN) schema asyncapi >docs/contracts/asyncapi.json
	$(BIN)/python -m scripts.documents
	@[ -n "$$AMQP_URL" ] || $(BIN)/python -m scripts.services rabbitmq
	$(BIN)/python -m scripts.demo_picture

asyncapi: $(STAMP) ## check docs/contracts/asyncapi.json with AsyncAPI's own parser and generator; needs Node.js
	@scripts/check-asyncapi $(BIN)/python

format: $(STAMP) ## format the code, and apply the fixes of ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --require-hashes: an install today and one next year are the same, the build backend included.
$(STAMP): $(LOCK) pyproject.toml scripts/venv scripts/apt-install scripts/show-progress
	@scripts/venv $(PYTHON) $(VENV)
	@scripts/show-progress "installing $$(grep -c == $(LOCK)) locked packages into $(VENV) (230 MB, half a minute or more)" \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(LOCK)
	@scripts/show-progress "installing this project into $(VENV)" \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The packages of the benchmark are installed in addition.
$(BENCH_STAMP): $(STAMP) $(BENCH_LOCK)
	@scripts/show-progress "installing the comparison's packages into $(VENV)" \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(BENCH_LOCK)
	@touch $@

$(RELEASE_STAMP): $(STAMP) $(RELEASE_LOCK)
	@scripts/show-progress "installing the packages for releases into $(VENV)" \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(RELEASE_LOCK)
	@touch $@

UV_COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links --upgrade pyproject.toml

lock: ## resolve the dependencies again (needs uv)
	$(UV_COMPILE) --all-extras --output-file requirements/runtime.lock
	$(UV_COMPILE) --extra otel --extra redis --constraint requirements/runtime.lock \
		--output-file requirements/production.lock
	$(UV_COMPILE) --all-extras --group dev --constraint requirements/runtime.lock --output-file $(LOCK)
	$(UV_COMPILE) --all-extras --group dev --group bench --constraint $(LOCK) --output-file $(BENCH_LOCK)
	$(UV_COMPILE) --group release --constraint $(LOCK) --output-file $(RELEASE_LOCK)

# --strict: where the source of advisories does not know a package, nothing has been audited.
audit: $(RELEASE_STAMP) ## known vulnerabilities in the locked packages, if a source of advisories can be reached
	@$(BIN)/pip-audit --strict --disable-pip --progress-spinner off --requirement requirements/production.lock \
		--requirement requirements/bench.lock --requirement requirements/release.lock \
		|| { echo "make: a table above lists vulnerabilities; 'could not be audited' means that nothing was audited, because the source of advisories does not know the package" >&2; exit 1; }

sbom: $(RELEASE_STAMP) ## dist/sbom.cdx.json: the packages of the image (CycloneDX)
	@mkdir -p dist
	@PYTHONWARNINGS=ignore::UserWarning $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --of JSON \
		--output-file dist/sbom.cdx.json requirements/production.lock
	@echo "dist/sbom.cdx.json: $$(grep -c '"bom-ref"' dist/sbom.cdx.json) components"

dist: $(STAMP) ## the wheel and the source archive, in dist
	@$(BIN)/python -m hatchling build --directory dist

clean: ## remove what was built
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage* tests/asyncapi/node_modules
