# SPDX-License-Identifier: GPL-2.0
# The front door: `make run` does the main job, `make help` lists the rest. Each target calls one script; what is built
# goes to build/, what is fetched to the cache folder ($XDG_CACHE_HOME, ~/.cache).
#
# Variables: BASE=v6.12 another kernel that there are patches for (scripts/versions), KSRC=/path a kernel source tree of your
# own (only read), KDIR=/path a kernel build of your own for `modules`, LLVM=1 for clang, V=1 the whole output,
# ACCEL=tcg|kvm|counted|auto, RUNNER=vng for virtme-ng, TESTS="PROGRAM[,ARG...]", JOBS=N.

MAKEFLAGS += --no-print-directory
.NOTPARALLEL:
.DELETE_ON_ERROR:
SHELL := /bin/bash

export BASE ARCH LLVM V KSRC KDIR TESTS ACCEL RUNNER JOBS LIMIT TIMEOUT N ARGS CELL TOOLCHAIN DEBIAN_MIRROR LINUX_TARBALL_SHA256 INSTALL_PATH URL
# What was given to this make is meant for the scripts, and not for every make below them.
unexport MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL

BUILD := build/$(or $(BASE),$(firstword $(shell sed -nE 's/^\t"(v[^ ]+) .*/\1/p' scripts/versions)))
export XDG_CACHE_HOME ?= $(HOME)/.cache

help: ## What can be made
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

run: boot ## The main job: both kernels, the guest workload on each, one table, build/results.json
	@scripts/compare

test: ## Every test: the Rust workspace, checkpatch, bad input, both kernels
	@scripts/test

# Linux has Rust and KASAN in one kernel only where clang compiles it.
test-debug: export LLVM := $(or $(LLVM),1)
test-debug: selftests ## Every test program on a debug build of the kernel with both series; what it finds is a failure
	@scripts/kernel-tree unpatched
	@scripts/both-series
	@scripts/kernel-build debug
	@scripts/module debug
	@scripts/boot debug $(TESTS)

test-each-patch: selftests ## The kernel after each patch of the series: it boots, and what held before still holds
	@scripts/kernel-tree unpatched
	@scripts/boot-each-patch $(TESTS)

test-mutants: selftests ## Kernels with one rule broken at a time (MUTANTS="NAME ...": only these): the tests have to notice
	@scripts/mutants $(MUTANTS)

test-matrix: modules selftests ## Both kernels again: without nested paging, preempted anywhere, and with a slower memory tier
	@scripts/matrix $(TESTS)

test-real: modules selftests ## Both kernels with an assigned device: real DMA, and guest memory that the kernel pins for it
	@scripts/real

test-page-tables: kernels selftests ## The series numa-page-tables: where KVM's page tables are, on the unpatched kernel, with the series, and with both
	@scripts/page-tables

compare-page-tables: kernels selftests ## What the series numa-page-tables gives and costs: placement, retries and cost of faults, N= rounds
	@scripts/compare-page-tables

compare-delayed-map: ## What it costs other CPUs, and a VM, if a hint fault maps a page before it migrates it, N= rounds (ARGS=: sizes and rates)
	@scripts/compare-delayed-map

test-kselftest: modules selftests ## The kernel's own tests of KVM and mm, on both kernels, with the same outcome (TESTS="kvm:NAME ...": only these)
	@scripts/kselftest $(TESTS)

compare: ## Every design in patches/v7.3/alternatives and numa-protect, the same cells on each, N= rounds (DESIGNS=, CELL=)
	@scripts/designs --check $(DESIGNS)
	@$(MAKE) selftests
	@scripts/designs $(DESIGNS)

report: selftests ## What make compare measured (DATA=FILE: an earlier run), as build/report/index.html and its figures
	@scripts/report $(DATA)

bench-recorder: modules selftests ## What it costs to record a callback, in instructions and in time, beside a tracepoint and a kprobe
	@ACCEL=counted RESULTS=bench.counted APPEND=tsc=reliable scripts/boot patched /bin/bench-recorder,--unit=instructions
	@RESULTS=bench APPEND=tsc=reliable scripts/boot patched /bin/bench-recorder,--cpus=1,--cpus=2,--cpus=4,--steps=4
	@cat $(BUILD)/patched/bench.counted/bench-recorder.txt $(BUILD)/patched/bench/bench-recorder.txt

bench-scan: modules selftests ## What NUMA scans of pinned memory cost on both kernels, by its size
	@for kernel in unpatched patched; do RESULTS=bench.scan APPEND=tsc=reliable scripts/boot $$kernel /bin/bench-scan || exit; done
	@tail -n +1 $(BUILD)/{unpatched,patched}/bench.scan/bench-scan.txt

test-arches: ## What each of the two series touches, compiled for other architectures and with options off
	@scripts/kernel-tree unpatched
	@scripts/arches
	@scripts/arches numa-page-tables

kernels: ## The unpatched and the patched kernel
	@scripts/kernel-tree unpatched
	@scripts/patches apply
	@scripts/kernel-build unpatched
	@scripts/kernel-build patched

ifdef KDIR
modules: ## The recorder, for both kernels, or for the one in KDIR=
	@scripts/kernel-tree unpatched
	@scripts/module own
else
modules: kernels
	@scripts/module unpatched
	@scripts/module patched
endif

selftests: ## The test programs and the runner
	@scripts/kernel-tree unpatched
	@scripts/cargo build --locked --release --quiet

boot: modules selftests ## Boot both kernels with all tests, or with TESTS="PROGRAM[,ARG...] ..."
	@scripts/boot unpatched $(TESTS)
	@scripts/boot patched $(TESTS)

patches-apply: ## patches/ -> the branch numa-protect in build/v7.3/patched/linux
	@scripts/patches apply

patches-export: ## that branch -> patches/
	@scripts/patches export

checkpatch: ## checkpatch.pl --strict on every patch
	@scripts/checkpatch

kselftest-install: selftests ## The tests as a collection for the kernel's own runner, in INSTALL_PATH=, to be copied to a machine with the patched kernel
	@scripts/kselftest-install

lab: modules selftests ## What a LAVA lab takes, in build/lab: kernel, tests, root file system, job, which tuxrun runs here (URL=: it is for a lab, where these files are there; TESTS="numa_notify:NAME ...")
	@scripts/lab $(TESTS)

clean: ## Remove what was built; kernel trees with changes of your own are kept
	@scripts/clean

distclean: clean ## Remove the cache folder too: sources, toolchain, compiler caches
	@scripts/clean cache

.PHONY: help run test test-debug test-each-patch test-mutants test-matrix test-real test-page-tables test-kselftest kselftest-install lab test-arches kernels modules selftests boot bench-recorder bench-scan compare compare-page-tables compare-delayed-map report patches-apply patches-export checkpatch clean distclean
