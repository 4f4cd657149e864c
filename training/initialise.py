"""Create a policy with random weights and another policy's architecture and tokenizer, to train from scratch.

    python -m training.initialise path/to/a/policy --out my_policy --seed 0

Writes a folder like any other policy's (`policy: {model: my_policy}`); the same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training.job import JobError, check_model_folder
from training.state.model_folder import load_tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.initialise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("policy", type=Path, help="transformers folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"{options.out} exists; choose another --out")
    try:
        check_model_folder(options.policy, str(options.policy))
        tokenizer = load_tokenizer(str(options.policy))
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(options.policy, local_files_only=True)
    )
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {model.num_parameters():,} parameters, drawn with seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
