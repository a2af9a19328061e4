"""A tiny Hugging Face folder with a real tokenizer: the command line's whole job in seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers
from model_files import write_model

import qnpu_jax
from qnpu_jax import job, progress
from qnpu_jax.config import ModelConfig
from qnpu_jax.models.huggingface import read_config
from qnpu_jax.models.llama import expected_tensors
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.recipes import RECIPES, load_recipe
from qnpu_jax.text.files import default_text

VOCAB = 320
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PREFILL, EVAL_TOKENS = 16, 32
QUANTIZE = (
    f"quantize model --recipe recipe.json --effort none --calibration text.txt --out out"
    f" --prefill {PREFILL} --eval-tokens {EVAL_TOKENS}"
).split()
"""What was asked of `workspace`'s out/."""


def workspace(folder: Path) -> Path:
    """A folder with model/, recipe.json, text.txt and out/, made when first asked for."""
    if not folder.exists():
        write_inputs(folder)
        job.run(request(folder), Simulated, progress.Observer())
    return folder


def request(folder: Path, **changes) -> job.Job:
    """QUANTIZE, as the command line passes it on."""
    settings = {
        "model": str(folder / "model"),
        "recipe": load_recipe(str(folder / "recipe.json")),
        "out": folder / "out",
        "calibration": folder / "text.txt",
        "prefill": PREFILL,
        "eval_tokens": EVAL_TOKENS,
    }
    return job.Job(**settings | changes)


def write_inputs(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_model(folder / "model")
    recipe = RECIPES["w8a8"].to_json() | {"calibration_tokens": 128, "calibration_length": 32}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "text.txt").write_text(default_text()[50_000:60_000])
    return folder


def start(*args: str, cwd: Path, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """The command line in a process of its own, 80 columns wide."""
    env = {**os.environ, "PYTHONPATH": str(Path(qnpu_jax.__file__).parents[1]), "COLUMNS": "80"}
    # A shell ignores Ctrl-C for what it runs in the background, and so would all that tests start.
    run = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_module('qnpu_jax.cli', run_name='__main__')"
    )
    command = [sys.executable, "-c", run, *args]
    return subprocess.Popen(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=stderr
    )


def write_tiny_model(folder: Path, vocab_size: int = VOCAB, layers: int = 2) -> Path:
    """Random weights, and byte-level BPE trained on Python's documentation."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    write_model(folder, config, random_tensors(read_config(folder)))
    _write_tokenizer(folder, vocab_size)
    return folder


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights by their Hugging Face names: norms near 1, matrices of standard deviation 0.2."""
    rng = np.random.default_rng(0)
    out = {}
    for tensor in expected_tensors(config):
        for i in range(config.num_layers if tensor.per_layer else 1):
            x = rng.normal(0, 0.2, tensor.shape).astype(np.float32)
            out[tensor.hf.format(i=i)] = x + 1 if "norm" in tensor.hf else x
    return out


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([default_text()[:20_000]], trainer)
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Of a Hugging Face folder's model.safetensors, in place."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
