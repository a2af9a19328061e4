"""Checks of a learned model: its file against LiteRT's reference kernels, and three chats."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rows import Row

from qnpu_jax import pipeline
from qnpu_jax.api import generate, verify, write_tflite
from qnpu_jax.models import FIXED_DATE, Tokenizer
from qnpu_jax.text import self_written

if TYPE_CHECKING:
    from protocol import Bench

ASKED = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Give me three tips for sleeping better.",
)
PREFILL, CACHE = 32, 96
"""Tokens of a chunk of the file that is verified, and positions of its cache."""
ANSWER = 96
"""Tokens of an answer, at most."""


def checked(bench: Bench, made: pipeline.Quantized) -> Row:
    """Elements of the file and how many differ from the simulator's; answers beside float's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        write_tflite(made.model, path, PREFILL, "last", CACHE)
        found = verify(made.model, path, bench.held_out[0])
    compared = {"elements": found.elements, "differing": found.differing}
    return {"verify": compared, "chats": _chats(bench, made)}


def _chats(bench: Bench, made: pipeline.Quantized) -> list[dict[str, str]]:
    """Answers of the integers and of the original, both greedy.

    Without a chat template they go on with the questions.
    """
    tokenizer = bench.checkpoint.tokenizer
    turns = [[{"role": "user", "content": question}] for question in ASKED]
    asked = turns if tokenizer.chat_template else ASKED
    answers = [generate(made.model, x, tokenizer=tokenizer, max_tokens=ANSWER) for x in asked]
    prompts = [
        tokenizer.encode(x) if isinstance(x, str) else tokenizer.chat(x, bos=False, now=FIXED_DATE)
        for x in asked
    ]
    original = _originals(prompts, tokenizer, made)
    return [
        {"asked": question, "integers": mine, "float": other}
        for question, mine, other in zip(ASKED, answers, original, strict=True)
    ]


def _originals(
    prompts: list[list[int]], tokenizer: Tokenizer, made: pipeline.Quantized
) -> list[str]:
    """The original's answers to prompts without BOS, which its parameters hold if it has one."""
    writer = self_written.Writer(made.model.config, made.model.plan, made.reference)
    greedy = self_written.Drawing(0, temperature=0.0, stop=tokenizer.eos_ids)
    length = min(max(map(len, prompts)) + ANSWER, made.model.config.max_positions)
    rows = self_written.sample(writer, prompts, length, greedy)
    return [
        _until(row[len(prompt) :][:ANSWER].tolist(), tokenizer)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _until(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text before the first token that ends a turn."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.eos_ids), len(ids))
    return tokenizer.decode(ids[:end])
