# Commands for new users, developers and CI. Each target installs what it needs; see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DEMO_INSTALLED := $(VENV)/demo-installed
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable

# Debian packages that some tests start. The demo needs none of them.
TEST_PACKAGES := openssl jq isal qemu-utils python3-libnbd ntfs-3g fdisk libarchive-tools postgresql gcc libc6-dev \
	radosgw ceph-mon ceph-osd ceph-common \
	qemu-system-x86 libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients python3-libvirt grub-common grub-pc-bin \
	systemd bubblewrap acl nginx caddy curl ansible-core
CONTAINER_PACKAGES := podman runc netavark aardvark-dns iptables debootstrap
CLIENT_PACKAGES := awscli golang-go golang-github-aws-aws-sdk-go-dev golang-github-aws-aws-sdk-go-v2-dev \
	ruby ruby-aws-sdk libnet-amazon-ec2-perl libvm-ec2-perl $(shell command -v npm >/dev/null || echo nodejs npm)
BENCH_PACKAGES := openssl pigz isal ntfs-3g fdisk wrk postgresql

.PHONY: demo test test-sweep test-fast test-containers simulate coverage check site package bench bench-api bench-fleet bench-stores bench-downtime clients stores conformance docs format clean

demo: $(DEMO_INSTALLED)
	$(BIN)/thrave demo

ALL_TESTS := pytest -n 4 --dist loadfile --no-loadscope-reorder

# Every behaviour, with one case of each kind. SWEEP=1 also runs what `make test-sweep` does, with the same servers.
test: $(INSTALLED) packages
	$(BIN)/$(ALL_TESTS) -m "not ($(if $(SWEEP),,sweep or )containers)"

# The other cases: a kill at each failpoint, each EC2 client, each statement that can fail, long random runs.
test-sweep: $(INSTALLED) packages
	$(BIN)/$(ALL_TESTS) -m sweep

# Makes the images of packaging/containers and a Debian, and runs them. Takes six minutes, and needs root with all capabilities.
test-containers: $(INSTALLED)
	@scripts/system-packages $(CONTAINER_PACKAGES)
	$(BIN)/pytest -m containers tests/packaging

# Runs new seeds of the simulation (docs/explanation/simulation.md). SECONDS=3600 runs them for an hour.
simulate: $(INSTALLED)
	cd tests && ../$(BIN)/python -m simulation.run --new --seconds $(or $(SECONDS),60)

# Takes a third longer: every line and branch is counted, in every process that the tests start.
coverage: $(INSTALLED) packages
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(ALL_TESTS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --fail-under=90

test-fast: $(INSTALLED)
	$(BIN)/pytest -m "not (clients or postgres or s3 or rgw or libvirt or browser or slow or sweep or containers)"

check: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/make_docs.py --check
	$(BIN)/python scripts/check_words.py
	$(BIN)/python scripts/make_site.py

# The documentation, in .cache/site/html.
site: $(INSTALLED)
	$(BIN)/python scripts/make_site.py

# DIST=dist keeps wheel and sdist in the folder dist. ONLY=3.11 tries only this Python.
package: $(INSTALLED)
	$(BIN)/python scripts/check_package.py $(if $(ONLY),--python $(ONLY)) $(DIST)

bench: $(INSTALLED)
	@scripts/system-packages $(BENCH_PACKAGES)
	$(BIN)/python benchmarks/bench.py

bench-api: $(INSTALLED)
	@scripts/system-packages $(BENCH_PACKAGES)
	$(BIN)/python benchmarks/api.py

bench-fleet: $(INSTALLED)
	@scripts/system-packages $(BENCH_PACKAGES)
	$(BIN)/python benchmarks/fleet.py

# GIB=200 seals 200 GiB into a store that discards them.
bench-stores: $(INSTALLED) packages
	@scripts/system-packages rclone
	$(BIN)/python benchmarks/stores.py --gib $(or $(GIB),8)

bench-downtime: $(INSTALLED) packages
	$(BIN)/python benchmarks/downtime.py

# Runs every client and generates the table of what each supports.
clients: $(INSTALLED) packages
	mkdir -p .cache
	THRAVE_CLIENTS_TABLE=.cache/clients.json $(BIN)/pytest tests/clients
	$(BIN)/python scripts/make_clients_table.py .cache/clients.json

# Runs `thrave doctor` on every store that the tests start, and generates the table of results.
stores: $(INSTALLED) packages
	PYTHONPATH=tests $(BIN)/python scripts/make_stores_table.py

# Runs the probes on Thrave, moto and ministack, which is installed in an environment of its own; `make docs` makes the page.
conformance: $(INSTALLED)
	@scripts/make-venv $(PYTHON) .cache/ministack
	.cache/ministack/bin/python -m pip install --disable-pip-version-check ministack==1.5.33
	PYTHONPATH=tests $(BIN)/python scripts/probe_conformance.py .cache/ministack/bin/ministack
	$(BIN)/python scripts/make_docs.py

docs: $(INSTALLED)
	$(BIN)/python scripts/make_docs.py

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.PHONY: packages
packages:
	@scripts/system-packages $(TEST_PACKAGES) $(CLIENT_PACKAGES)

$(INSTALLED): pyproject.toml constraints.txt
	@scripts/make-venv $(PYTHON) $(VENV)
	$(PIP_INSTALL) '.[dev]'
	touch $@

# A quarter of the developer's environment (170 instead of 750 MiB).
$(DEMO_INSTALLED): pyproject.toml constraints.txt
	@scripts/make-venv $(PYTHON) $(VENV)
	$(PIP_INSTALL) '.[demo]'
	touch $@

clean:
	rm -rf $(VENV) .cache build src/*.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis thrave-demo
