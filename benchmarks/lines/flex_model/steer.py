# examples/steering.py; docstring of steering_vector
from flex_model.lens import steering_vector

from given import LAYER, ids, negative, positive
from preamble import fm

found = steering_vector(fm, positive, negative, layer=LAYER)
answer = fm.edit(fm.at("resid_post", LAYER), found.edit(scale=4.0)).run(ids).logits
