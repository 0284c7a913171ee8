PYTHON ?= python3
BIN = .venv/bin
SEEDS = 0 1 2
BASELINES = lcm dmd
VARIANTS = decay no_gan no_diffusion constant grow no_semantic no_trajectory no_video $(BASELINES)
files = $(foreach s,$(SEEDS),$(foreach v,$1,runs/ablation/$v_$s/fast_adapter.safetensors))
RUNS = $(call files,$(VARIANTS))

no_diffusion = --use_diffusion false --diffusion_first 0 --steps 160
no_gan = --use_gan false
constant = --diffusion_scale constant
decay = --diffusion_scale decay
grow = --diffusion_scale grow
no_semantic = --without semantic
no_trajectory = --without trajectory
no_video = --without video

.PHONY: demo test ablation

demo: .venv/ready
	$(BIN)/python sample.py
	@echo "To go on in this shell: source .venv/bin/activate"

test: .venv/ready-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadscope

# Killed, it goes on where it was.
ablation: .venv/ready
	@echo "$(words $(RUNS)) runs from the shipped networks, two at a time."
	OMP_NUM_THREADS=1 $(MAKE) -j2 $(RUNS)
	$(BIN)/python -m toy.evaluate --ablation --videos 64 --out results/ablation.json

runs/ablation/%/fast_adapter.safetensors: | .venv/ready
	$(BIN)/python finetune_hybrid.py --name ablation/$* --seed $(lastword $(subst _, ,$*)) \
		$($(patsubst %_$(lastword $(subst _, ,$*)),%,$*))

$(call files,$(BASELINES)): runs/ablation/%/fast_adapter.safetensors: | .venv/ready
	$(BIN)/python -m tools.train_baseline --loss $(firstword $(subst _, ,$*)) \
		--name ablation/$* --seed $(lastword $(subst _, ,$*))

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@
