# https://huggingface.co/docs/transformers/main_classes/output, hidden_states;
# https://scikit-learn.org/stable/modules/generated/sklearn.linear_model.LogisticRegression.html
from sklearn.linear_model import LogisticRegression

from given import LAYER, labels, model, test, train

probe = LogisticRegression().fit(
    model(train, output_hidden_states=True).hidden_states[LAYER + 1][:, -1], labels
)
answer = probe.predict(model(test, output_hidden_states=True).hidden_states[LAYER + 1][:, -1])
