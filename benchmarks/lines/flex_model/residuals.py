# docstrings of FlexModel.at and FlexModel.capture
from given import ids
from preamble import fm

answer = fm.capture(fm.at("resid_post")).run(ids).stack()
