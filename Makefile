# Every task a person does here. `make help` lists them; CI runs `make lint test` and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
CARGO ?= cargo
# Where rustup puts cargo: a shell that was open before `make tools` does not know yet.
export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

.PHONY: demo
demo: build ## Serve the demo model, prefill and decode apart, and stream one completion
	target/debug/baton up -f examples/tiny.yaml --prompt "Once upon a time, a small fox" --max-tokens 96

.PHONY: up
up: build ## Serve the demo model until Ctrl-C
	target/debug/baton up -f examples/tiny.yaml

.PHONY: build
build: tools ## Build every binary (one profile for demo and tests)
	$(CARGO) build --workspace --bins --locked

# What is printed is a folder of programs; where one can't be had, the suites that need it say so and are skipped.
.PHONY: test-cluster
test-cluster: tools ## Build and fetch a real Kubernetes, a real node and checkov for the tests, once
	@scripts/test-cluster --node >/dev/null || true
	@scripts/checkov >/dev/null || true

.PHONY: test
test: build test-cluster ## Unit, property, fixture, API, whole-process and operator tests
	$(CARGO) test --workspace --locked

.PHONY: test-operator
test-operator: build test-cluster ## The operator on a real API server: life, crashes, faults, bad input, rights, install (part of test)
	$(CARGO) test --workspace --locked --test api_definition --test 'operator_*' --test 'install_*'

FUZZ_CASES ?= 5000

.PHONY: fuzz-operator
fuzz-operator: build test-cluster ## Schema-mutated manifests against a running operator, FUZZ_CASES of them
	BATON_FUZZ_CASES=$(FUZZ_CASES) $(CARGO) test --workspace --locked --test operator_fuzz -- --nocapture

.PHONY: e2e
e2e: build test-cluster ## A real node: Helm install, a model on a volume, a handoff between pods, uninstall (root on Debian)
	$(CARGO) test --workspace --locked --test e2e -- --ignored --nocapture

.PHONY: lint
lint: tools check-generate ## Format, clippy with warnings as errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

.PHONY: fmt
fmt: ## Format everything
	$(CARGO) fmt --all

CRD := crds/disaggregatedmodels.baton.dev.yaml
# Not -p baton-crds: a package built alone has other features, so its dependencies would be compiled a second time.
CRDGEN := run --locked -q --bin crdgen --

MANIFESTGEN := run --locked -q --bin manifestgen --

.PHONY: generate
generate: tools ## Write generated files: the API's definition, the chart's and kustomize's rights and workloads
	$(CARGO) $(CRDGEN) $(CRD) docs/conditions.md
	cp $(CRD) charts/baton/crds/
	$(CARGO) $(MANIFESTGEN) .

.PHONY: check-generate
check-generate: tools ## Fail when a generated file is stale
	@rm -rf target/generated && mkdir -p target/generated/{crds,docs,charts/baton/crds}
	@$(CARGO) $(CRDGEN) target/generated/$(CRD) target/generated/docs/conditions.md && cp target/generated/$(CRD) target/generated/charts/baton/crds/
	@$(CARGO) $(MANIFESTGEN) target/generated
	@cd target/generated && find . -type f | sort | while read -r file; do diff -u "../../$$file" "$$file" || exit 1; done \
		|| { echo "generated files are stale: run 'make generate' and commit the result"; exit 1; }

PROFILE ?= release

.PHONY: images
images: tools ## Assemble OCI archives of operator, proxy and worker in target/images (PROFILE=release or dev)
	$(CARGO) build --locked --profile $(PROFILE) --bin baton-operator --bin baton-proxy --bin baton-worker
	scripts/images --profile $(PROFILE)

.PHONY: bench
bench: bench-first-token bench-operator bench-proxy bench-api-keys ## All benchmarks

.PHONY: bench-first-token
bench-first-token: build ## Time from `baton up` to the first token, with its goal
	benches/first-token

.PHONY: bench-operator
bench-operator: build test-cluster ## 1,000 models on a real API server: time, calls, memory and CPU, beside LeaderWorkerSet's controller
	benches/operator

.PHONY: bench-proxy
bench-proxy: tools ## The routing proxy beside vllm-router, sglang-router, smg and a floor, with mock engines: CPU, latency, memory
	benches/proxy

# The proxy alone: of the other packages nothing is measured, and their tests would be compiled anew with all that they need.
.PHONY: bench-api-keys
bench-api-keys: tools ## Whether the time of a key's lookup tells anything of the keys in the file, beside one that does
	$(CARGO) test --locked --release -p baton-proxy --lib -- --ignored --nocapture api_keys::timing

.PHONY: tools
tools: ## Install what a bare Debian machine lacks, saying so
	@scripts/tools
