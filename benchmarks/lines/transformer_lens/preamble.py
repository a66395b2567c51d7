from copy import deepcopy

from transformer_lens.model_bridge.sources import build_bridge_from_module

from given import model as given

model = build_bridge_from_module(deepcopy(given), "GPT2LMHeadModel", hf_config=given.config)
model.enable_compatibility_mode(no_processing=True)
model.eval()
