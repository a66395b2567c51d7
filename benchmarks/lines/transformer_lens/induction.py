# demos/Main_Demo.ipynb, "Hooks: Accessing Activations"; head_detector.detect_head gives another
# score, and takes strings
from given import length, repeated
from preamble import model

answer = (
    model.run_with_cache(repeated)[1]
    .stack_activation("pattern")
    .diagonal(1 - length, -2, -1)
    .mean((1, 3))
)
