"""Which layers know whether a film was liked? A linear probe on each, scored on words that it has not seen.

Run: python examples/probe.py                                    (a tiny random model)
Run: python examples/probe.py --model FOLDER                     (a real one, with its tokenizer)
Run: torchrun --nproc-per-node 2 examples/probe.py               (tensor parallel)
Run: torchrun --nproc-per-node 2 examples/probe.py --fsdp2
"""

import torch
import torch.distributed as dist
from loading import start
from torch import Tensor

from flex_model.lens import train_probes

WORDS = (  # not liked, liked; the last four of each are for the test
    ("awful", "bad", "boring", "dull", "poor", "sad", "weak", "ugly", "terrible", "dreadful", "horrible", "tedious"),
    ("fine", "good", "great", "nice", "fun", "lovely", "superb", "warm", "wonderful", "excellent", "amazing", "clever"),
)
FRAMES = "I saw it, and found it {}. That film", "The plot was {} and so I", "My friend called it {}, which"


def main() -> None:
    job = start()

    def batch(frame: str, words: slice) -> tuple[dict[str, Tensor], Tensor]:
        """This rank's rows of one sentence with every word, and whether it is a good one."""
        pairs = [(word, kind) for kind in (0, 1) for word in WORDS[kind][words]]
        inputs = job.tokens([frame.format(word) for word, _ in pairs])
        return {k: job.mine(v) for k, v in inputs.items()}, job.mine(torch.tensor([kind for _, kind in pairs]))

    train = [batch(frame, slice(0, 8)) for frame in FRAMES]
    test = [batch(frame, slice(8, 12)) for frame in FRAMES]
    sweep = train_probes(job.fm, train, test=test)
    for probe in sweep:
        job.show(f"layer {probe.layer}: accuracy {probe.train_score:.4f}, of new words {probe.accuracy:.4f}")
    job.show(f"best: layer {sweep.best.layer}, along a direction of length {sweep.best.direction.norm():.4g}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
