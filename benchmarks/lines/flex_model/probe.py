# examples/probe.py; docstring of train_probe
from flex_model.lens import train_probe

from given import LAYER, labels, test, test_labels, train
from preamble import fm

probe = train_probe(fm, [(train, labels)], layer=LAYER, test=[(test, test_labels)])
answer = probe.predicted
