"""Generate with a model of `transformers` whose experts are a service's.

The model's attention, embeddings and head are here, its experts at the service, and `generate` does not notice. To run
it, offline and without GPU:

    make serve                                                  # in one terminal: a small model over 2 CPU ranks
    .venv/bin/pip install transformers
    .venv/bin/python deploy/examples/generate_with_transformers.py     # in another

All weights are random, so the text is too. With a model that has learned something, `make_model` and `fill` become

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")

where FOLDER is what `moe-forward quantize` made the served checkpoint of.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moe_forward import Client
from moe_forward.client import read_api_key
from moe_forward.integrations.transformers import attach

BYTES = 256
"""Vocabulary of a model that reads and writes single bytes, and needs no tokenizer's file."""


def make_model(placement: dict[str, Any]) -> DeepseekV3ForCausalLM:
    """Make a DeepSeek-V3 around the layers that a service describes, without memory for any weight.

    placement: answer of `/v1/placement`.
    """
    layers, experts = placement["layers"], placement["num_experts"]
    config = DeepseekV3Config(
        vocab_size=BYTES,
        hidden_size=placement["hidden_size"],
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=max(layers) + 1,
        first_k_dense_replace=min(layers),
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=experts,
        n_shared_experts=int(placement["shared_experts"]),
        n_group=1,
        topk_group=1,
        num_experts_per_tok=placement["top_k"],
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(config).eval()


def fill(model: DeepseekV3ForCausalLM) -> None:
    """Give memory and random weights to what stands in the model now."""
    torch.manual_seed(0)
    model.to_empty(device="cpu")
    model.init_weights()


def main(arguments: argparse.Namespace) -> None:
    """Attach a model to the service and let it continue a text."""
    api_key = None if arguments.api_key_file is None else read_api_key(arguments.api_key_file)
    with Client(arguments.url, api_key=api_key) as client:
        model = make_model(client.placement())
    prompt = torch.tensor([list(arguments.prompt.encode())])
    mask = torch.ones_like(prompt)
    with attach(model, arguments.url, api_key=api_key) as attached:
        fill(model)  # after attach: the experts are gone from it and take no memory here
        held = sum(parameter.numel() for parameter in model.parameters())
        print(f"layers {list(attached.layers)} are computed at {arguments.url}, {held} parameters are here")
        started = time.perf_counter()
        tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=arguments.new_tokens, do_sample=False)
        seconds = time.perf_counter() - started
    print(bytes(tokens[0].tolist()))
    print(f"{arguments.new_tokens} tokens in {seconds:.2f} s")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service")
    parser.add_argument("--api-key-file", help="file whose first key to send, where the service asks for one")
    parser.add_argument("--prompt", default="The experts of this model are", help="text to continue")
    parser.add_argument("--new-tokens", type=int, default=16, help="how many tokens to generate")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
