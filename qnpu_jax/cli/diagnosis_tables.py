"""Tables of `qnpu diagnose`: tensors by what they lose; and what 16 bits would do."""

from __future__ import annotations

import typer
from rich.table import Table

from qnpu_jax.cli.tables import show, table
from qnpu_jax.diagnose import Diagnosis
from qnpu_jax.latency import roofline
from qnpu_jax.plan import Suggested


def print_diagnosis(found: Diagnosis, top: int) -> None:
    """Prints the `top` worst tensors, the same over all layers, and the KL of three readings."""
    show(_tensors(found, top), _kinds(found))
    count, length = found.text.windows.shape
    kl = found.kl
    typer.echo(
        f"KL of {count} x {length} tokens of {found.text.source}, in nats a token, from"
        f" {found.reference}: simulator {kl['simulator']:.4f}, fake-quant {kl['fake_quant']:.4f},"
        f" with exact activations {kl['constants']:.4f}"
    )


def print_suggested(made: Suggested, top: int) -> None:
    """Prints what 16 bits for the `top` worst groups of activations would do, and for all taken."""
    shown = table(
        f"activations at 16 bits: KL is a prediction by charges (nats a token, before learning"
        f" again), seconds an {roofline.LABEL}, off by up to {100 * made.error[0]:.0f}% (token) and"
        f" {100 * made.error[1]:.0f}% (chunk)",
        ("tensor", "KL", "token", "chunk", "taken", "with"),
        ("tensor", "with"),
    )
    shown.columns[0].no_wrap, shown.columns[-1].overflow = True, "fold"
    for one in made.groups[:top]:
        shown.add_row(
            one.tensor, f"{one.kl:+.4f}", _change(one.decode), _change(one.prefill),
            "yes" if one.taken else "", ", ".join(one.along),
        )  # fmt: skip
    show(shown)
    if made.recipe is None:
        typer.echo("nothing that is charged fits within the time given; no recipe is suggested")
    else:
        typer.echo(
            f"{made.recipe.name}: KL {made.kl:+.4f} (predicted; all activations lose"
            f" {made.lost:.4f}), a token {_change(made.decode)}, a"
            f" chunk {_change(made.prefill)} ({roofline.LABEL})"
        )


def _change(relative: float) -> str:
    return f"{100 * relative:+.2f}%"


def _tensors(found: Diagnosis, top: int) -> Table:
    """The worst, and what was made exact."""
    total = found.kl["simulator"]
    alone = {r.tensor: r.kl / total if total else 0.0 for r in found.replaced}
    columns = ("tensor", "KL %", "exact %", "own dB", "dB", "clip %", "used %")
    made = table("worst tensors by their share of the KL", columns, left=["tensor"])
    for i, r in enumerate(found.worst):
        if i < top or r.tensor in alone:
            made.add_row(
                r.tensor,
                _percent(found.share(r)),
                _percent(alone.get(r.tensor)),
                _number(r.own_sqnr),
                _number(r.sqnr),
                "design" if r.by_design else _percent(r.clipped),
                _percent(r.used),
            )
    return made


def _kinds(found: Diagnosis) -> Table:
    made = table("the same over all layers", ("tensor", "KL %"), left=["tensor"])
    for name, share in list(found.kinds().items())[:8]:
        made.add_row(name, _percent(share))
    if total := found.kl["simulator"]:
        made.add_row("weights and other constants", _percent(found.kl["constants"] / total))
    return made


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}"
