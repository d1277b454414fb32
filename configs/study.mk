# What the studies share: configs/METHOD/Makefile is the study of METHOD, and `make -C configs/METHOD`
# runs it on the sandbox, in an environment with prompt-lab. Settings, behind the command:
#
#   BACKBONE  folder or hub id of a language model (default: sandbox)
#   ROOT      folder of CrossFit's files; needed with another BACKBONE
#   RUNS      folder for all that is made (default: runs/METHOD of the repository)
#   SCALE     factor of the steps of every fit (default: 1; at least 4 steps remain)
#
# Targets are files that a fit or test writes last, and every fit is a `fit --resume`: make again goes
# on where it was stopped. A fit has one thread, so that its numbers repeat; `-j2` runs two at once.
# Other settings want another RUNS.
BACKBONE ?= sandbox
ROOT ?= sandbox
RUNS ?= $(abspath ../..)/runs/$(notdir $(CURDIR))
SCALE ?= 1
export OMP_NUM_THREADS := 1

comma := ,
# $(call list,a b): [a,b]
list = [$(subst $() ,$(comma),$(strip $(1)))]
scaled = $(shell awk 'BEGIN {n = int($(1) * $(SCALE) + .5); print n < 4 ? 4 : n}')
# Both of a number of steps: how many come between two evaluations, and the four at which there is one.
quarter = $(shell awk 'BEGIN {n = int($(1) * $(SCALE) + .5); print n < 8 ? 1 : int((n + 3) / 4)}')
evaluations = $(shell awk 'BEGIN {q = $(call quarter,$(1)); n = $(call scaled,$(1)); \
	printf "[%d,%d,%d,%d]", q, 2 * q, 3 * q, n}')
# $(call fit,FLAGS,STEPS): a fit in the folder of the target, evaluated four times. Configs are among the
# FLAGS, which stand first, since a later word counts.
fit = prompt-lab fit $(1) --resume --run_dir $(@D) --trainer.max_steps $(call scaled,$(2)) \
	--trainer.val_check_interval $(call quarter,$(2))

.PHONY: all
all: $(RUNS)/report/report.md

# On another model, a study that names its `samples` reads copies of their files, with the first
# `test_rows` of every test set; its first fits need $(data).
test_rows ?= 200
ifeq ($(BACKBONE),sandbox)
model :=
data :=
else ifdef samples
model := --model.backbone.name $(BACKBONE) --data.root $(RUNS)/data
data := $(RUNS)/data/done
else
model := --model.backbone.name $(BACKBONE) --data.root $(ROOT)
endif

$(RUNS)/data/done:
	cd $(ROOT) && for file in $(samples:%=*/*_*_%_*.tsv); do test -f $$file || continue; \
		mkdir -p $(@D)/$$(dirname $$file) || exit 1; case $$file in \
		*_test.tsv) head -n $(test_rows) $$file;; *) cat $$file;; esac > $(@D)/$$file || exit 1; done
	touch $@
