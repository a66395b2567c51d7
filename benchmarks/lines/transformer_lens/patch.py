# demos/Activation_Patching_in_TL_Demo.ipynb
from given import clean, corrupted, metric
from preamble import model
from transformer_lens import patching

answer = patching.get_act_patch_resid_pre(
    model, corrupted, model.run_with_cache(clean)[1], metric
) - metric(model(corrupted))
