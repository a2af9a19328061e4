"""A text of chats to judge on: one model answers questions, another is judged by them.

The questions (`chat_questions.txt`) stand in no list that a model's own text begins with. Every
chat has two turns: a question, its answer, FOLLOW_UP and the answer to that. The same model,
questions and seed give the same text on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from qnpu_jax import pipeline
from qnpu_jax.errors import UserError
from qnpu_jax.models import FIXED_DATE
from qnpu_jax.models.checkpoint import Checkpoint, load
from qnpu_jax.recipes import load_recipe
from qnpu_jax.text.self_written import Drawing, Writer, sample

QUESTIONS = Path(__file__).with_name("chat_questions.txt")
FOLLOW_UP = "Thank you. Can you give me an example?"
ANSWER = 192
"""Tokens of an answer, at most."""
TEMPERATURE = 0.7

Chat = list[dict[str, str]]


def answered(checkpoint: Checkpoint, writer: Writer, chats: list[Chat], seed: int) -> list[Chat]:
    """Appends the model's answer to each chat; chats without one are left out."""
    tokenizer = checkpoint.tokenizer
    prompts = [tokenizer.chat(chat, now=FIXED_DATE) for chat in chats]
    length = max(map(len, prompts)) + ANSWER
    drawing = Drawing(seed, TEMPERATURE, tokenizer.eos_ids, tokenizer.bos_id)
    rows = sample(writer, prompts, length, drawing)
    out = []
    for chat, prompt, row in zip(chats, prompts, rows.tolist(), strict=True):
        ids = row[len(prompt) - (prompt[0] == tokenizer.bos_id) :]
        stops = [i for i, token in enumerate(ids) if token in tokenizer.eos_ids]
        text = tokenizer.decode(ids[: min([*stops, ANSWER])]).strip()
        if text:
            out.append([*chat, {"role": "assistant", "content": text}])
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="JSON lines, a chat in each")
    parser.add_argument("--model", default="smollm2-135m", help="that answers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        checkpoint = load(args.model)
        recipe = load_recipe("w8a8")
        params = pipeline.prepare(checkpoint.config, checkpoint.params, recipe)
        writer = Writer(checkpoint.config, recipe.bits, params)
        questions = QUESTIONS.read_text("utf-8").splitlines()
        chats = [[{"role": "user", "content": q}] for q in questions]
        chats = answered(checkpoint, writer, chats, args.seed)
        chats = [[*chat, {"role": "user", "content": FOLLOW_UP}] for chat in chats]
        chats = answered(checkpoint, writer, chats, args.seed + 1)
        text = "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
        args.out.write_text(text, "utf-8")
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(f"wrote {args.out}: {len(chats)} chats, {len(text):,} characters, {digest[:12]}...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
