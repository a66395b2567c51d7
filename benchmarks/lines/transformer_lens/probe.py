# docs, "The Hook System", run_with_cache; the regression is scikit-learn's, because
# fit_sparse_probe takes its test rows from those that it is given
from sklearn.linear_model import LogisticRegression

from given import LAYER, labels, test, train
from preamble import model

probe = LogisticRegression().fit(model.run_with_cache(train)[1]["resid_post", LAYER][:, -1], labels)
answer = probe.predict(model.run_with_cache(test)[1]["resid_post", LAYER][:, -1])
