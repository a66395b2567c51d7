# docs, "The Hook System", run_with_cache; ActivationCache.stack_activation
from given import ids
from preamble import model

answer = model.run_with_cache(ids)[1].stack_activation("resid_post")
