"""Hadamard and random orthogonal matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from qnpu_jax.errors import UserError

Seed = int | Sequence[int]
Matrix64 = Float64[np.ndarray, "n n"]


# --- Hadamard matrices ---


def _jacobsthal(q: int) -> Int[np.ndarray, "q q"]:
    """Q[i, j] = chi(i - j) for an odd prime q, with Q Q^T = q I - J and Q J = 0 (J all ones).

    chi is the quadratic character: 0 at 0, 1 at squares, -1 elsewhere. Q is skew for q = 3 mod 4,
    symmetric for q = 1 mod 4.
    """
    chi = np.full(q, -1)
    chi[np.arange(1, q) ** 2 % q] = 1
    chi[0] = 0
    i = np.arange(q)
    return chi[(i[:, None] - i[None, :]) % q]


def _bordered(q: int, corner: int) -> Int[np.ndarray, "n n"]:
    """S = [[0, 1^T], [corner 1, Q]] of order q + 1: S S^T = q I when corner = chi(-1)."""
    s = np.zeros((q + 1, q + 1), np.int64)
    s[0, 1:] = 1
    s[1:, 0] = corner
    s[1:, 1:] = _jacobsthal(q)
    return s


def _paley_one(q: int) -> Int[np.ndarray, "n n"]:
    """H = I + S of order q + 1, for a prime q = 3 mod 4.

    S^T = -S, so H H^T = I + S + S^T + S S^T = (q + 1) I.
    """
    return np.eye(q + 1, dtype=np.int64) + _bordered(q, -1)


def _paley_two(q: int) -> Int[np.ndarray, "n n"]:
    """H = S (x) A + I (x) B of order 2 (q + 1), for a prime q = 1 mod 4.

    A = [[1, 1], [1, -1]], B = [[1, -1], [-1, -1]]: A A^T = B B^T = 2 I and A B^T + B A^T = 0.
    With S^T = S, H H^T = S S^T (x) 2 I + I (x) 2 I = 2 (q + 1) I.
    """
    a, b = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(_bordered(q, 1), a) + np.kron(np.eye(q + 1, dtype=np.int64), b)


def _core(order: int) -> int | None:
    """Returns the c of 1, 12, 20, 28, 36 with order = c 2^k, or None."""
    odd = order // (order & -order) if order > 0 else 0
    core = {1: 1, 3: 12, 5: 20, 7: 28, 9: 36}.get(odd)
    return core if core is not None and order % core == 0 else None


def has_hadamard(order: int) -> bool:
    """Tells whether `hadamard` constructs this order: 2^k, or 12, 20, 28, 36 times 2^k.

    >>> has_hadamard(576), has_hadamard(100)
    (True, False)
    """
    return _core(order) is not None


def hadamard(order: int) -> Int[np.ndarray, "n n"]:
    """Constructs a matrix of +1 and -1 with H H^T = order I, exactly.

    >>> hadamard(2)
    array([[ 1,  1],
           [ 1, -1]])

    Sylvester's doubling [[H, H], [H, -H]] of a core of order 1, 12 (Paley I, q = 11), 20 (Paley I,
    19), 28 (Paley II, 13) or 36 (Paley II, 17). 576 = 36 * 16, 1536 = 12 * 128, 64 = 2^6.

    Raises:
      UserError: no construction for this order; see `has_hadamard`.

    Reference: R. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933), lemmas 2 and 3.
    """
    match _core(order):
        case 1:
            h = np.ones((1, 1), np.int64)
        case 12 | 20 as core:
            h = _paley_one(core - 1)
        case 28 | 36 as core:
            h = _paley_two(core // 2 - 1)
        case _:
            raise UserError(
                f"Hadamard matrix of order {order}: expected 2^k or 12, 20, 28, 36 times 2^k;"
                " use `random_orthogonal`"
            )
    while len(h) < order:
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    return h


# --- random rotations ---


def random_hadamard(order: int, seed: Seed) -> Matrix64:
    """Draws R = H diag(signs) / sqrt(order), orthogonal; the same bits on every platform.

    Args:
      order: one that `has_hadamard`.
      seed: of the signs.

    Raises:
      UserError: as `hadamard`.
    """
    signs = 2 * np.random.default_rng(seed).integers(0, 2, order) - 1
    return hadamard(order) * signs / np.sqrt(order)


def random_orthogonal(order: int, seed: Seed) -> Matrix64:
    """Draws an orthogonal matrix, uniformly (Haar measure).

    It is Q of a Gaussian matrix's QR, columns signed so that R's diagonal is positive. Platforms
    agree up to the rounding of their LAPACK: where bits must match, merge one and the same array.

    >>> q = random_orthogonal(3, seed=0)
    >>> bool(np.allclose(q @ q.T, np.eye(3)))
    True

    Reference: F. Mezzadri, How to generate random matrices from the classical compact groups
    (2007), section 5.
    """
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((order, order)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)
