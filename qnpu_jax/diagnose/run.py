"""Diagnosis of a folder of `qnpu quantize`: the loss of precision of every tensor.

The simulator is an argument (`integer.simulator.Simulate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.diagnose import model_explorer
from qnpu_jax.diagnose.attribution import kl, replaced, without
from qnpu_jax.diagnose.summary import Tally, TensorRow, mean
from qnpu_jax.diagnose.tensor_errors import Constants, measure_window, rounding_tensors
from qnpu_jax.errors import UserError, nearest
from qnpu_jax.graph import LAYERS, Tensors, split_name
from qnpu_jax.integer import IntegerModel, Simulate
from qnpu_jax.measure import Logits, float_logits
from qnpu_jax.models import EMBEDDED, load
from qnpu_jax.output import OutputFolder
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import Recipe
from qnpu_jax.text import Excerpt, excerpts
from qnpu_jax.transform import add_prefix, fold_norms

FORMAT = 1
"""Version of the layout of diagnosis.json."""
OWN = "own constants in float"
"""Name of the reference of the KL where the original model is not at hand."""
SQNR_OVERLAY, SHARE_OVERLAY = "sqnr.model_explorer.json", "kl.model_explorer.json"
HEAT_MAP, SUGGESTED = "heat_map.svg", "suggested.json"
KIND = artifacts.Kind(
    "qnpu diagnose",
    frozenset({"diagnosis.json", SQNR_OVERLAY, SHARE_OVERLAY, HEAT_MAP, SUGGESTED}),
    "diagnosis.json",
)


@dataclass(frozen=True)
class DiagnosisRequest:
    """Request of a diagnosis.

    Attributes:
      folder: of `qnpu quantize`.
      text: text to read; None takes `pydoc_data.topics`.
      tokens: tokens of a window.
      windows: number of windows; fewer are read where the text is shorter.
      model: the original float model; None takes the one that the report names, if a package holds
        it.
      replace: shell-style patterns of tensors to make exact, one at a time.
      exact: number of tensors with the largest share of the KL to make exact beside these.
      out: folder to write; None takes one in `folder`.
    """

    folder: Path
    text: Path | None = None
    tokens: int = 128
    windows: int = 4
    model: str | None = None
    replace: tuple[str, ...] = ()
    exact: int = 8
    out: Path | None = None

    def target(self) -> Path:
        """Returns the folder to write."""
        return self.folder / artifacts.DIAGNOSIS if self.out is None else self.out


@dataclass(frozen=True)
class ReplacedTensor:
    """Fall of the KL when one tensor is exact, in nats per position.

    Standard errors are over windows, and None for a single window.

    Attributes:
      tensor: global name.
      kl, error: fall with all other errors kept (`attribution.without`), and its standard error.
      fake_quant, fake_quant_error: fall in fake-quant, where later tensors round anew
        (`attribution.replaced`), and its standard error.
      charged: fall that `attribution.charges` expects.
    """

    tensor: str
    kl: float
    error: float | None
    fake_quant: float
    fake_quant_error: float | None
    charged: float


@dataclass(frozen=True)
class Diagnosis:
    """Result of a diagnosis.

    Attributes:
      model: SHA-256 of the folder's model.tflite.
      text: the text that was read.
      reference: name of the model whose logits KL is measured from.
      kl: nats per position from the reference to `simulator`, to `constants` (the float pass on
        the model's own constants) and to `fake_quant`.
      rows: one for each activation tensor, in the order of the graph.
      replaced: tensors that were made exact.
    """

    model: str
    text: Excerpt
    reference: str
    kl: dict[str, float]
    rows: tuple[TensorRow, ...]
    replaced: tuple[ReplacedTensor, ...]

    @property
    def worst(self) -> list[TensorRow]:
        """Rows of tensors that round, by falling share of the KL."""
        return sorted((r for r in self.rows if r.rounds), key=lambda r: -(r.kl or 0.0))

    def share(self, row: TensorRow) -> float:
        """Returns the fraction of the KL that a tensor is charged."""
        total = self.kl["simulator"]
        return (row.kl or 0.0) / total if total else 0.0

    def kinds(self) -> dict[str, float]:
        """Returns shares added over layers, by name without the layer, falling."""
        found: dict[str, float] = {}
        for row in self.worst:
            name, layer = split_name(row.tensor)
            name = name if layer is None else name.replace(LAYERS, LAYERS + "*.", 1)
            found[name] = found.get(name, 0.0) + self.share(row)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """Returns the contents of diagnosis.json."""
        return {
            "format": FORMAT,
            "model": self.model,
            "text": self.text.to_json() | {"windows": list(self.text.windows.shape)},
            "reference": {"tensors": OWN, "logits": self.reference},
            "kl": self.kl,
            "replaced": [asdict(r) for r in self.replaced],
            "tensors": artifacts.columns(asdict(r) for r in self.rows),
        }


Draw = Callable[[Diagnosis, Path], None]
"""Draws a diagnosis into a file."""


@jax.default_matmul_precision("highest")  # a GPU's TF32 errs more than 16 bits do
def diagnose(request: DiagnosisRequest, simulate: Simulate, watch: Observer) -> Diagnosis:
    """Runs windows of text in the simulator and in float, and compares every tensor.

    Raises:
      UserError: not a folder of `qnpu quantize`; a text or window that is too short; a pattern that
        matches nothing; an original model that is not the one that was quantized.
    """
    with watch.stage("load"):
        folder = OutputFolder.open(request.folder)
        artifacts.check_writable(request.target(), True, KIND)
        model = folder.model
        read = excerpts.tokenized(request.text, folder.tokenizer, model.config.vocab_size)
        text = read.first(request.tokens, request.tokens * request.windows)
        constants = Constants.of(model, request.tokens)
        chosen = matching(constants, request.replace)
    ids = list(text.windows)
    with watch.stage("original"):
        source, references = _originals(request, folder, ids, watch)
    with watch.stage("compare"):
        simulator = simulate(model, request.tokens, "all")
        tally = Tally(constants)
        for i in watch.track(range(len(ids)), len(ids), "compare"):
            references[i] = tally.read(ids[i], simulator.tensors(ids[i]), references[i])
    rows = tally.rows()
    worst = sorted((r for r in rows if r.rounds), key=lambda r: -(r.kl or 0.0))
    names = list(dict.fromkeys([*chosen, *(r.tensor for r in worst[: request.exact])]))
    with watch.stage("replace"):
        kls = []
        for i in watch.track(range(len(ids)), len(ids), "replace"):
            errors = measure_window(constants, ids[i], simulator.tensors(ids[i])).errors
            kls.append(_exact_kls(constants, ids[i], references[i], errors, names))
    by_tensor = np.stack(kls)  # (windows, 1 + names, 2), as `_exact_kls`
    made = [
        _replacement(name, by_tensor[:, 0] - by_tensor[:, i], tally.charged()[name][0])
        for i, name in enumerate(names, start=1)
    ]
    totals = tally.kl() | {"fake_quant": float(by_tensor[:, 0, 1].mean())}
    return Diagnosis(folder.sha256, text, source, totals, tuple(rows), tuple(made))


def matching(constants: Constants, patterns: Iterable[str]) -> list[str]:
    """Returns the tensors that round and match patterns, such as `layers.*.mlp.act`.

    For each pattern they come in the order of the graph.

    Raises:
      UserError: a pattern matches none.
    """
    known = rounding_tensors(constants.decoder)
    found: list[str] = []
    for pattern in patterns:
        matched = [n for n in known if fnmatchcase(n, pattern)]
        if not matched:
            raise UserError(
                f"--replace {pattern}: matches no tensor that is rounded; expected a name like"
                f" {next(iter(known))}, or a pattern; `qnpu graph` prints names, and what copies"
                " codes (reshape, slice, concat, transpose, widening) rounds nothing"
                + nearest(pattern, known)
            )
        found += matched
    return found


def _originals(
    request: DiagnosisRequest, folder: OutputFolder, ids: list, watch: Observer
) -> tuple[str, list[Any]]:
    """Returns the name of the reference, and its logits of each window.

    Logits are None where the original model is not at hand.
    """
    source = request.model or folder.report.get("model")
    try:
        if request.model is None and source not in EMBEDDED:
            raise UserError("name it by --model")
        name, logits = original(str(source), folder.path, folder.model)
    except UserError as error:
        if request.model is not None:
            raise
        watch.say(f"KL from the model's {OWN}, as its original is not at hand: {error}")
        return OWN, [None] * len(ids)
    tracked = watch.track(ids, len(ids), "original")
    return name, [jnp.asarray(logits(window)) for window in tracked]


def original(source: str, folder: Path, model: IntegerModel) -> tuple[str, Logits]:
    """Loads the float model that a folder was quantized from, and puts the same prefix before it.

    Returns:
      Its name, and its function from ids to logits.

    Raises:
      UserError: as `checkpoint.load`, or it is another model.
    """
    checkpoint = load(source)
    try:
        recipe = artifacts.parse_json((folder / artifacts.RECIPE).read_text())
        expected = recipe.get("inputs", {}).get("model", {}).get("sha256", checkpoint.sha256)
    except (OSError, ValueError, AttributeError):
        expected = checkpoint.sha256
    plain = replace(model.config, centred_keys=False, double_norms=False)
    if plain.intermediate_size > checkpoint.config.intermediate_size:  # `Recipe.split_channels`
        plain = replace(plain, intermediate_size=checkpoint.config.intermediate_size)
    other_shape = checkpoint.config != plain
    if other_shape or expected != checkpoint.sha256:
        raise UserError(
            f"{source}: not the model that {folder} was quantized from, by its"
            f" {'shape' if other_shape else 'SHA-256'}; expected that one; correct --model"
        )
    folded = fold_norms(checkpoint.config, dict(checkpoint.params))
    params = {name: jnp.asarray(x) for name, x in folded.items()}
    if model.prefix:
        params = add_prefix(checkpoint.config, model.plan, params, model.prefix)
    return checkpoint.source, float_logits(checkpoint.config, model.plan, params)


def _exact_kls(
    constants: Constants, ids: np.ndarray, reference: Any, errors: Tensors, names: list[str]
) -> np.ndarray:
    """Returns the KL with no tensor exact, and with each of the names exact.

    Returns:
      (1 + names, 2): with all other errors kept, and in fake-quant.
    """
    return np.array([
        [
            kl(reference, without(constants, ids, errors, exact)),
            kl(reference, replaced(constants, ids, exact)),
        ]
        for exact in [[], *([name] for name in names)]
    ])  # fmt: skip


def _replacement(name: str, falls: np.ndarray, charged: float) -> ReplacedTensor:
    """Averages falls of the KL (windows, 2), columns as in `_exact_kls`."""
    return ReplacedTensor(name, *mean(falls[:, 0]), *mean(falls[:, 1]), charged)


def write_diagnosis(
    found: Diagnosis, out: Path, draw: Draw | None = None, suggested: Recipe | None = None
) -> None:
    """Writes the folder of a diagnosis, whole or not at all, in place of an earlier one.

    Args:
      out: the folder.
      draw: draws the heat map; None leaves it out.
      suggested: recipe that follows from the diagnosis (`plan.suggested`); None leaves it out.

    Raises:
      UserError: `out` holds other files, or cannot be written.
    """
    rounded = [r for r in found.rows if r.rounds]
    own = {r.tensor: r.own_sqnr for r in rounded if r.own_sqnr is not None}
    shares = {r.tensor: 100 * found.share(r) for r in rounded}
    with artifacts.writing(out, overwrite=True, kind=KIND) as folder:
        artifacts.write_json(folder / KIND.mark, found.to_json())
        for file, data in (
            (SQNR_OVERLAY, model_explorer.node_data("own SQNR, dB", own, model_explorer.SQNR)),
            (
                SHARE_OVERLAY,
                model_explorer.node_data("share of KL, %", shares, model_explorer.SHARE),
            ),
        ):
            artifacts.write_json(folder / file, data)
        if draw is not None:
            draw(found, folder / HEAT_MAP)
        if suggested is not None:
            artifacts.write_json(folder / SUGGESTED, suggested.to_json())
