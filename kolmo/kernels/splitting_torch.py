"""Alternating directions in torch: band matrices along the lines of a grid, in blocks of positions.

An elimination from position to position, as on one core, would leave a GPU idle: n kernels in a row, each with little
to do. Here a line is cut into blocks. With B, C, E the blocks on, below and above the diagonal,

    D₀ = B₀,  D_{l+1} = B_{l+1} − G_l E_l,  G_l = C_l D_l⁻¹,  W_l = D_l⁻¹ E_l,

the matrix is (I + G) D (I + W), blocks G_l below and W_l above the diagonal. All that is large (products with D⁻¹, G
and W) is done for all blocks and lines at once; from block to block only as many values are handed on as there are
diagonals beside the main one.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Positions in a block: longer blocks hand on less often and take more memory, 8 bytes a position of the block and node.
BLOCK = 16


@dataclass(frozen=True)
class Blocks:
    """Factors of one band matrix per line.

    Attributes
    ----------
    lower : tensor, shape (blocks - 1, lines, below, BLOCK)
        G: from a block to the first values of the next.
    inverse : tensor, shape (blocks, lines, BLOCK, BLOCK)
        D⁻¹.
    upper : tensor, shape (blocks - 1, lines, BLOCK, above)
        W: from the first values of the next block to a block.
    n : int
        Length of the lines.
    stride : int
        Stride of their axis.
    """

    lower: Any
    inverse: Any
    upper: Any
    n: int
    stride: int

    @property
    def transposed(self) -> "Blocks":
        """Those of the transposed matrices: (I + Wᵀ) Dᵀ (I + Gᵀ)."""
        return Blocks(self.upper.mT, self.inverse.mT, self.lower.mT, self.n, self.stride)


def factor_lines(matrices: Any, below: int, stride: int) -> Blocks:
    """Factors of band matrices ``matrices[i, below + j − i, line]``."""
    n, width, lines = matrices.shape
    above = width - 1 - below
    # where the ends are joined the band is as wide as the matrix: one block, a dense inverse
    size = n if below + above >= n else max(BLOCK, below, above)
    count = -(-n // size)
    padded = torch.zeros((count * size, width, lines), dtype=matrices.dtype, device=matrices.device)
    padded[:n] = matrices
    padded[n:, below] = 1.0
    band = padded.reshape(count, size, width, lines).permute(0, 3, 1, 2)
    # columns of the block before, of the block itself and of the one after, side by side
    wide = band.new_zeros((count, lines, size, below + size + above))
    for r in range(size):
        wide[:, :, r, r : r + width] = band[:, :, r]
    C, B, E = wide[..., :below], wide[..., below : below + size], wide[..., below + size :]
    lower, upper = band.new_zeros((count - 1, lines, below, size)), band.new_zeros((count - 1, lines, size, above))
    inverse = torch.empty_like(B)
    for block in range(count):
        D = B[block].clone()
        if block > 0:
            torch.matmul(C[block, :, :below], inverse[block - 1, :, size - below :], out=lower[block - 1])
            # E is zero but in its last rows
            D[:, :below, :above] -= lower[block - 1] @ E[block - 1]
        # not checked: the host would have to wait for the answer, and what is singular shows in the solution
        inverse[block] = torch.linalg.inv_ex(D).inverse
        if block < count - 1:
            torch.matmul(inverse[block], E[block], out=upper[block])
    return Blocks(lower, inverse, upper, n, stride)


def solve_fields(factors: Blocks, b: Any, transposed: bool) -> Any:
    """Solve along every line of the axis for fields (size, k)."""
    blocks = factors.transposed if transposed else factors
    n, stride, columns = blocks.n, blocks.stride, b.shape[1]
    count, lines, size, _ = blocks.inverse.shape
    outer = lines // stride
    along = b.reshape(outer, n, stride, columns).permute(1, 0, 2, 3).reshape(n, lines, columns)
    x = b.new_zeros((count * size, lines, columns))
    x[:n] = along
    x = _solve(blocks, x.reshape(count, size, lines, columns).transpose(1, 2))
    x = x.transpose(1, 2).reshape(count * size, outer, stride, columns)[:n]
    return x.transpose(0, 1).reshape(b.shape)


def _solve(blocks: Blocks, x: Any) -> Any:
    """Solve for right sides (blocks, lines, BLOCK, k)."""
    count, below, above = len(x), blocks.lower.shape[2], blocks.upper.shape[3]
    handed = blocks.lower @ x[:-1]
    for link in range(1, count - 1):
        handed[link] -= blocks.lower[link, :, :, :below] @ handed[link - 1]
    y = x.contiguous()
    y[1:, :, :below] -= handed
    z = blocks.inverse @ y
    heads = z[1:, :, :above].clone()
    for link in range(count - 3, -1, -1):
        heads[link] -= blocks.upper[link + 1, :, :above] @ heads[link + 1]
    z[:-1] -= blocks.upper @ heads
    return z
