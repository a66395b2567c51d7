# README.md, "Any transformer by one set of names"; docstring of FlexModel.edit
from flex_model import edits
from given import HEAD, LAYER, ids
from preamble import fm

answer = fm.edit(fm.at("z", LAYER, head=HEAD), edits.zero()).run(ids).logits
