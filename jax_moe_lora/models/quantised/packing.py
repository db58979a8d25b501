"""From the order that a file packs four-bit numbers in to the one that `Quantised` has: two columns of a row a byte.

Each function writes some rows of a file's tensor, `piece`, the first of which is row `start`, into an array of the
matrix. Words are little endian, eight numbers each.
"""

from collections.abc import Callable

import numpy as np

Store = Callable[[np.ndarray, np.ndarray, int], None]
"""`store(target, piece, start)`."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # number n of a word's eight stands in its nibble AWQ_ORDER[n]


class Disagreement(ValueError):
    """A tensor says what does not fit, or what is not supported."""


def rows(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """As they stand, whatever axes of length one they have."""
    if target.ndim == 0 or target.size == 1:
        target[...] = piece.reshape(target.shape)
    else:
        target[start : start + len(piece)] = piece.reshape(len(piece), -1)


def reciprocal(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """One number that divides, in place of one that multiplies."""
    if not np.isfinite(piece).all() or not piece.all():
        raise Disagreement(f"is {piece.reshape(-1)[0]}, and divides")
    rows(target, (1 / piece.astype(np.float64)).astype(np.float32), start)


def little_endian(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Eight columns of a row a word, the first in the low bits."""
    target[start : start + len(piece)] = np.ascontiguousarray(piece).view(np.uint8)


def packed_rows(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Eight rows of a column a word, the first in the low bits."""
    codes = nibbles(piece.T).T
    end = min(8 * (start + len(piece)), len(target))
    target[8 * start : end] = codes[: end - 8 * start]


def turned(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Columns in place of rows."""
    target[:, start : start + len(piece)] = piece.T


def awq_values(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Rows of `[in, out]`, eight columns a word in AWQ's order."""
    codes = nibbles(piece, AWQ_ORDER)
    target[:, start // 2 : (start + len(piece)) // 2] = (codes[0::2] | (codes[1::2] << 4)).T


def awq_zeros(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Zero points of `[groups, out]`, eight columns a word in AWQ's order."""
    turned(target, nibbles(piece, AWQ_ORDER), start)


def gptq_values(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Words of `[in / 8, out]`, eight rows each."""
    words, out = piece.shape
    octets = np.ascontiguousarray(piece).view(np.uint8).reshape(words, out, 4)
    target[:, 4 * start : 4 * (start + words)] = octets.transpose(1, 0, 2).reshape(out, 4 * words)


def gptq_zeros_v2(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """Zero points of `[groups, out]`, eight columns a word."""
    turned(target, nibbles(piece), start)


def gptq_zeros(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """The same less one, as the first format of GPTQ has them."""
    codes = nibbles(piece)
    if (codes == 15).any():
        raise Disagreement("has zero points of 15, which GPTQ's first format reads as 0 or as 16")
    turned(target, codes + 1, start)


def same_shape(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """The shape of the matrix; `target` is its rows, columns and groups of a row."""
    if piece.tolist() != target[:2].tolist():
        raise Disagreement(f"says {piece.tolist()}; expected {target[:2].tolist()}")


def ordered_groups(target: np.ndarray, piece: np.ndarray, start: int) -> None:
    """The group of each column, one after the other; zeros alone say nothing. `target` as for `same_shape`."""
    _, columns, groups = target.tolist()
    if piece.any() and (piece != np.arange(columns) * groups // columns).any():
        raise Disagreement(
            f"has columns in another order (act-order) or of other groups than the {groups} that have scales, which is "
            "not supported"
        )


def nibbles(words: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """The numbers of words `[..., n]`, `[..., 8 * n]` in uint8.

    Args:
      words: int32.
      order: of each of a word's numbers the nibble that it stands in.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    halves = np.stack((octets & 0xF, octets >> 4), axis=-1).reshape(*words.shape, 8)
    return halves[..., list(order)].reshape(*words.shape[:-1], -1)
