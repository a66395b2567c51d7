# examples/induction_heads.py
from flex_model.lens import induction_scores

from given import repeated
from preamble import fm

answer = induction_scores(fm, repeated)
