"""Train a small DeepSeek-V3 on the text of this machine, and save it in bf16.

    python tests/accuracy/train.py DIR                              about four minutes on one H200
    python tests/accuracy/train.py DIR --preset micro --steps 5     tries it on a CPU

Weights are kept in float32 beside the bf16 ones that the model computes with. The load of the experts is balanced by
the correction bias of the gates and by no other loss (DeepSeek-V3 report, arXiv 2412.19437, section 2.1.2): after each
step an expert with more tokens than the mean loses `bias_speed`, one with fewer gains it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, read_corpus
from model import make_model, moe_blocks
from recipe import PRESETS, Recipe
from torch import Tensor, nn

TRAINING_FILE = "training.json"
"""Beside the saved model: recipe, text, and what is worth knowing of the training."""

SAID_EVERY_STEPS = 50
MINUTES = 4.0


class Float32Weights:
    """AdamW on float32 copies of a bf16 model's weights. model: on the device to train on."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._ours = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._copies = [nn.Parameter(parameter.detach().float()) for parameter in self._ours]
        decayed, others = ([copy for copy in self._copies if (copy.ndim > 1) == matrix] for matrix in (True, False))
        self._largest_norm = recipe.largest_gradient_norm
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=recipe.betas,
            fused=self._copies[0].is_cuda,
        )

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Take a step by the model's gradients, and clear them. Returns: their norm, a scalar on the device."""
        for ours, copy in zip(self._ours, self._copies, strict=True):
            if ours.grad is None:
                raise RuntimeError(f"a weight of shape {list(ours.shape)} has no gradient")
            copy.grad = ours.grad.float()
            ours.grad = None
        norm = nn.utils.clip_grad_norm_(self._copies, self._largest_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        torch._foreach_copy_(self._ours, self._copies)
        return norm


class LoadBalance:
    """Counts the tokens of each expert and moves the gates' correction biases against them."""

    def __init__(self, model: nn.Module, speed: float) -> None:
        self._speed = speed
        self._gates = [block.gate for block in moe_blocks(model).values()]
        self._counts = [torch.zeros_like(gate.e_score_correction_bias) for gate in self._gates]
        for gate, counts in zip(self._gates, self._counts, strict=True):
            gate.register_forward_hook(lambda module, inputs, output, counts=counts: _count(output[2], counts))

    @torch.no_grad()
    def step(self) -> Tensor:
        """Move the biases and begin to count anew. Returns: the largest load over the mean, of the worst layer."""
        worst = torch.stack([counts.max() / counts.mean() for counts in self._counts]).max()
        for gate, counts in zip(self._gates, self._counts, strict=True):
            gate.e_score_correction_bias.add_(torch.sign(counts.mean() - counts), alpha=self._speed)
            counts.zero_()
        return worst


def _count(ids: Tensor, counts: Tensor) -> None:
    flat = ids.detach().flatten()
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Rise linearly, then fall along half a cosine."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / recipe.warmup_steps
    progress = min(1.0, (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps))
    low, high = recipe.last_learning_rate, recipe.peak_learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


class Batches:
    """Windows of a stream that do not overlap, in an order drawn anew for each pass. stream: [N] on the device."""

    def __init__(self, stream: Tensor, recipe: Recipe) -> None:
        self._stream = stream
        self._recipe = recipe
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._waiting = torch.empty(0, dtype=torch.int64)
        self._reach = torch.arange(recipe.window_tokens + 1, device=stream.device)

    def draw(self) -> Tensor:
        """Return [batch_windows, window_tokens + 1] int64."""
        count, length = self._recipe.batch_windows, self._recipe.window_tokens
        while len(self._waiting) < count:
            # passes begin at different places, so that windows are cut differently
            offset = int(torch.randint(length, (1,), generator=self._generator))
            windows = (len(self._stream) - 1 - offset) // length
            if windows < 1:
                raise ValueError(f"text: expected more than {2 * length} tokens to train on, got {len(self._stream)}")
            starts = torch.randperm(windows, generator=self._generator) * length + offset
            self._waiting = torch.cat([self._waiting, starts])
        starts, self._waiting = self._waiting[:count], self._waiting[count:]
        places = starts.to(self._stream.device).unsqueeze(1) + self._reach
        return self._stream[places].long()


def mean_loss(model: Any, windows: Tensor) -> Tensor:
    """Mean negative log likelihood of windows [B, S + 1], in nats a token."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def choose_experts(model: Any, windows: Tensor) -> dict[str, str]:
    """Take grouped matrix products for the experts where they have a backward here, else a loop over experts.

    windows: a small batch to find out with.
    Returns: what was chosen, and where it is the loop, why; for the results.
    """
    model.set_experts_implementation("grouped_mm")
    try:
        mean_loss(model, windows).backward()
    except (RuntimeError, NotImplementedError) as error:
        model.set_experts_implementation("eager")
        chosen = {"experts": "eager", "grouped_mm": f"{type(error).__name__}: {error}"}
        print(f"experts: a loop, since grouped_mm fails here: {error}", flush=True)
    else:
        chosen = {"experts": "grouped_mm"}
    model.zero_grad(set_to_none=True)
    return chosen


def train(
    folder: Path,
    recipe: Recipe,
    corpus: Corpus,
    device: torch.device,
    minutes: float = MINUTES,
    steps: int | None = None,
) -> dict[str, Any]:
    """Train and save a model.

    folder: where to. minutes: to train for, about; the number of steps follows from the time of the first ones.
    steps: how many instead, to repeat a run.
    Returns: what is worth knowing of the training, which is also saved beside the model.
    Raises: FloatingPointError where the loss is not finite any more.
    """
    model = make_model(recipe).to(device).train()
    batches = Batches(corpus.train.to(device), recipe)
    about: dict[str, Any] = choose_experts(model, batches.draw()[:2])
    weights, balance = Float32Weights(model, recipe), LoadBalance(model, recipe.bias_speed)
    losses: list[dict[str, float]] = []
    began = first_timed = time.monotonic()
    total = steps
    step = 0
    while total is None or step < total:
        loss = mean_loss(model, batches.draw())
        loss.backward()
        norm = weights.step(learning_rate(recipe, step, total or recipe.warmup_steps + 1))
        load = balance.step()
        step += 1
        if step in recipe.timed_steps:
            loss.item()  # waits for the device
            if step == recipe.timed_steps[0]:
                first_timed = time.monotonic()
            elif total is None:
                step_seconds = (time.monotonic() - first_timed) / (step - recipe.timed_steps[0])
                left_seconds = max(0.0, 60 * minutes - (time.monotonic() - began))
                total = step + int(left_seconds / step_seconds)
                print(f"{1e3 * step_seconds:.0f} ms a step: {total} steps", flush=True)
        if step == 1 or step % SAID_EVERY_STEPS == 0 or step == total:
            said = {"step": step, "loss": loss.item(), "gradient_norm": norm.item(), "largest_load": load.item()}
            said["seconds"] = round(time.monotonic() - began, 1)
            losses.append(said)
            print(" ".join(f"{name} {value:.4g}" for name, value in said.items()), flush=True)
            if not math.isfinite(said["loss"]):
                raise FloatingPointError(f"step {step}: the loss is {said['loss']}")
    seconds = time.monotonic() - began
    tokens = step * recipe.batch_windows * recipe.window_tokens
    about |= {
        "steps": step,
        "tokens": tokens,
        "passes": tokens / len(corpus.train),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
    }
    model.save_pretrained(folder)
    document = {"recipe": recipe.document(), "text": corpus.about, "training": about}
    (folder / TRAINING_FILE).write_text(json.dumps(document))
    return about


def main() -> None:
    """Parse the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is saved")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--steps", type=int, help="how many, instead of minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    recipe = PRESETS[options.preset]
    corpus = read_corpus(recipe)
    print(json.dumps(corpus.about, indent=1), flush=True)
    train(options.folder, recipe, corpus, torch.device(options.device), options.minutes, options.steps)


if __name__ == "__main__":
    main()
