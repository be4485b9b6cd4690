"""ModelOpt's INT8_SMOOTHQUANT_CFG on a checkpoint, scored on given tokens; runs in an environment of its own (quality_peers.py).

    python modelopt_worker.py CHECKPOINT GIVEN.npz OUT.npz

GIVEN holds ``calibration`` [n, L] and ``windows`` [m, W + 1] token ids, and ``reference`` [m, W, E], the float32 model's last hidden states; OUT gets
``nll`` and ``kl`` of every token, in nats, and ``best``, 1 where the best token is the reference's.
"""

from __future__ import annotations

import sys

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantise, score, write."""
    source, given, out = sys.argv[1:]
    data = np.load(given)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    lm_head = model.lm_head.weight.detach().clone()
    calibration = torch.from_numpy(data["calibration"])

    @torch.inference_mode()
    def run(model: torch.nn.Module) -> None:
        for ids in calibration:
            model(ids[None])

    model = mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, run)
    nll, kl, best = [], [], []
    with torch.inference_mode():
        for window, hidden in zip(torch.from_numpy(data["windows"]), torch.from_numpy(data["reference"]), strict=True):
            ours = model(window[None, :-1]).logits[0].log_softmax(-1)
            theirs = (hidden @ lm_head.T).log_softmax(-1)
            nll.append(-ours.gather(1, window[1:, None])[:, 0])
            kl.append((theirs.exp() * (theirs - ours)).sum(-1))
            best.append((ours.argmax(-1) == theirs.argmax(-1)).float())
    np.savez(out, **{name: torch.cat(parts).numpy() for name, parts in {"nll": nll, "kl": kl, "best": best}.items()})


if __name__ == "__main__":
    main()
