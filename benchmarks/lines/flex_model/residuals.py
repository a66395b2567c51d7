# README.md, "Any transformer by one set of names"; docstring of FlexModel.capture
from given import ids
from preamble import fm

answer = fm.capture(fm.at("resid_post")).run(ids).stack()
