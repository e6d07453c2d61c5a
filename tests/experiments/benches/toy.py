"""A bench as a newcomer would write it: one class, of which less is better."""

import hashlib
from dataclasses import dataclass, field

from experiments.benches.base import Bench
from experiments.content import input_digest
from experiments.metrics import Metric
from pbs.patch.huggingface import apply_patch_with_prefill, get_patch

LOSS = Metric("loss", "nats", higher_is_better=False, decimals=3)


@dataclass(kw_only=True)
class ToyBench(Bench):
    """The loss of a few random tokens, plus what a sparse method is made to lose.

    Args:
        lengths: in tokens.
        num_samples: of each length.
        penalty: loss of a method at density 0.
    """

    metrics = (LOSS,)
    cells_by = ("length",)

    lengths: list[int] = field(default_factory=lambda: [300, 600])
    num_samples: int = 3
    penalty: float = 1.0

    def run(self, context):
        """See the base class."""
        import torch

        samples = [(length, index) for length in self.lengths for index in range(self.num_samples)]
        context.announce(len(samples))
        for length, index in samples:
            name = f"{length}/{index}"
            if name in context.done:
                continue
            seed = int(hashlib.sha256(f"{context.cfg.seed}/{name}".encode()).hexdigest()[:8], 16)
            ids = torch.randint(1, 50, (1, length), generator=torch.Generator().manual_seed(seed))
            model = context.model.model
            with apply_patch_with_prefill(model, context.method), torch.inference_mode():
                model(ids)
                density = get_patch(model).report().density
            noise = (seed % 1000) / 1000
            context.add(
                {
                    "sample_id": name,
                    "length": length,
                    "input_digest": input_digest(ids[0].tolist()),
                    "density": density,
                    "loss": 2.0 + noise + self.penalty * (1 + noise) * (1 - density),
                }
            )
