"""`qnpu text`: a model writes a text of its own into a file that `--calibration` takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.models import checkpoint as models_checkpoint
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text import corpus, files, prompts, self_written
from qnpu_jax.transform import fold_norms


@dataclass(frozen=True)
class OwnText:
    """What to write.

    Attributes:
      model: as `qnpu_jax.load` takes it.
      out: the file, with a suffix of `files.JSON_LINES`.
      tokens: to write, at least; loops and repeats among them are left out of the file.
      length: tokens of a row, in which one document follows another: the longest document.
      seed: decides every draw.
      overwrite: replace a file that is there.
    """

    model: str
    out: Path
    tokens: int = 65_536
    length: int = 512
    seed: int = 0
    overwrite: bool = False


def write(asked: OwnText, watch: Observer) -> corpus.Corpus:
    """Writes the file, whole or not at all.

    Raises:
      UserError: a suffix that is not read as JSON lines, a file that is there already or cannot be
        written, rows longer than the model's positions, no text.
    """
    if asked.out.suffix.lower() not in files.JSON_LINES:
        raise UserError(
            f"{asked.out}: expected a name that ends in one of {', '.join(files.JSON_LINES)}, as"
            " each line is a document in JSON; name another file"
        )
    with artifacts.new_file(asked.out, replace=asked.overwrite) as path:
        with watch.stage("load"):
            checkpoint = models_checkpoint.load(asked.model)
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        if asked.length > config.max_positions:
            raise UserError(
                f"length: {asked.length} tokens; expected at most the model's"
                f" {config.max_positions} positions; choose a shorter --length"
            )
        with watch.stage("fold"):
            folded = fold_norms(config, checkpoint.params, consume=True)
            params = {name: jax.device_put(x) for name, x in folded.items()}
        count = max(1, -(-asked.tokens // asked.length))
        begun = prompts.prompts_of(tokenizer, count, asked.seed)
        with watch.stage("write text"):
            writer = self_written.Writer(config, RECIPES["w8a8"].bits, params)
            drawing = self_written.Drawing(asked.seed, stop=tokenizer.eos_ids, bos=tokenizer.bos_id)
            steps = partial(watch.track, what="write text")
            ids = [p.ids for p in begun]
            rows = self_written.sample(writer, ids, asked.length, drawing, steps)
            written = corpus.split(rows, begun, tokenizer.eos_ids, tokenizer.bos_id)
            found = corpus.corpus(written, tokenizer)
        if not found.lines:
            raise UserError(
                f"{asked.model}: wrote nothing but loops; expected some text; raise --tokens, or"
                " give text of another source to --calibration"
            )
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in found.lines)
        path.write_text("".join(lines), encoding="utf-8")
    return found
