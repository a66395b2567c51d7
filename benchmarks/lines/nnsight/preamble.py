from given import model as given
from nnsight import NNsight

model = NNsight(given)
