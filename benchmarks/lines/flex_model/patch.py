# examples/patching.py
from flex_model.lens import activation_patching

from given import clean, corrupted, metric
from preamble import fm

answer = activation_patching(fm, clean, corrupted, metric).effect
