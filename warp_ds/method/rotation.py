"""The complete orthonormal basis that a stored U stands for, and how to apply it cheaply.

A stored U [n, r] means the n columns [U, U⊥]: the complement U⊥ is what the Householder reflectors of U give
(the last n - r columns of Q in LAPACK's ``geqrf`` of U), so that every reader rotates into the same coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from warp_ds.method.products import EXACT, Products

#: Wider ones are ``polished`` on a GPU alone: 2 n³ fp64 operations are seconds at 4096 on the one core that launchers give a
#: rank, for each of a model's bases, and hours at 28672.
POLISH_ON_CPU = 2048
BLOCK = 1024


class Rotation:
    """Maps weights W [k, n] to rotated coefficients C = W U and back, U complete (n x n, orthonormal).

    Stored dense, or, where that takes fewer products (2 r < n), as r Householder reflectors in compact WY form,
    Q = I - V T Vᵀ (Schreiber and Van Loan, 1989): 4 k n r operations instead of 2 k n². ``identity`` rotates nothing.
    """

    def __init__(self, columns: Tensor | None, n: int, dtype: torch.dtype = torch.float32):
        """``columns`` is U [n, r], any float dtype, r <= n; None stands for the identity.

        Raises ValueError where U has the wrong shape or its columns are not orthonormal to 1e-3.
        """
        self.n = n
        self.matrix: Tensor | None = None
        self.reflectors: tuple[Tensor, Tensor, Tensor] | None = None
        if columns is None:
            return
        if columns.ndim != 2 or columns.shape[0] != n or columns.shape[1] > n:
            raise ValueError(f"a basis of a layer with {n} inputs is [{n}, r <= {n}], not {tuple(columns.shape)}")
        r = columns.shape[1]
        if r == n:
            _check_orthonormal(columns)
            self.matrix = columns.to(dtype)
            return
        v, t, signs = householder_wy(columns)
        if 2 * r < n:
            self.reflectors = (v.to(dtype), (v @ t.T).to(dtype), signs.to(dtype))
        else:
            q = torch.eye(n, dtype=torch.float64, device=columns.device) - v @ t @ v.T
            self.matrix = torch.cat([columns.double(), q[:, r:]], dim=1).to(dtype)

    @property
    def is_identity(self) -> bool:
        return self.matrix is None and self.reflectors is None

    @property
    def nbytes(self) -> int:
        """Bytes that the held form takes."""
        return sum(t.nbytes for t in self._tensors())

    @staticmethod
    def held_bytes(n: int, r: int, itemsize: int = 4) -> int:
        """``nbytes`` of the rotation that [n, r] stored columns make, before it is made."""
        return itemsize * (2 * n * r + r if 2 * r < n else n * n)

    def flops(self, rows: int) -> int:
        """Floating-point operations of one rotation of ``rows`` rows."""
        if self.matrix is not None:
            return 2 * rows * self.n * self.n
        return 4 * rows * self.n * self.reflectors[0].shape[1] if self.reflectors is not None else 0

    def rotate(self, w: Tensor, products: Products = EXACT) -> Tensor:
        """C = W U for W [k, n] of any float dtype; new tensor [k, n], fp32 (fp64 of fp64; W itself for the identity)."""
        if self.matrix is not None:
            return products.mm(w, self.matrix)
        if self.reflectors is None:
            return w
        v, y, signs = self.reflectors  # Q = I - V Yᵀ with Y = V Tᵀ
        c = products.addmm_(w.to(v.dtype, copy=True), products.mm(w, v), y.T, alpha=-1.0)
        c[:, : signs.numel()] *= signs
        return c

    def unrotate(self, c: Tensor, products: Products = EXACT) -> Tensor:
        """W = C Uᵀ for C [k, n]; new tensor [k, n] (C itself for the identity)."""
        if self.matrix is not None:
            return products.mm(c, self.matrix.T)
        if self.reflectors is None:
            return c
        v, y, signs = self.reflectors
        signed = c.clone()
        signed[:, : signs.numel()] *= signs
        return products.addmm_(signed, products.mm(signed, y), v.T, alpha=-1.0)

    def to(self, device: torch.device | str) -> Rotation:
        """The same rotation with its tensors on ``device``."""
        return self._with([t.to(device) for t in self._tensors()])

    def polished(self) -> Rotation:
        """A dense basis made more orthonormal, so that W U Uᵀ is W within fp32's rounding; any other one as it is.

        U - U (UᵀU - I) / 2, one step of Newton and Schulz's iteration: an eigensolver's fp32 columns are orthonormal to
        some tens of roundings. The error UᵀU - I is taken in fp64, a block at a time; its product with U, which is as
        small, in U's dtype. On a CPU a basis with n > POLISH_ON_CPU stays as it is.
        """
        u = self.matrix
        if u is None or (self.n > POLISH_ON_CPU and u.device.type == "cpu"):
            return self
        result = torch.empty_like(u)
        blocks = [slice(begin, min(begin + BLOCK, self.n)) for begin in range(0, self.n, BLOCK)]
        for columns in blocks:
            right = u[:, columns].double()
            error = torch.cat([u[:, rows].double().T @ right for rows in blocks])
            error[columns] -= torch.eye(right.shape[1], dtype=torch.float64, device=u.device)
            result[:, columns] = right - (u @ error.to(u.dtype)).double() / 2
        return self._with([result])

    def packed(self) -> Tensor:
        """All that is held as one vector; see ``unpacked``."""
        return torch.cat([t.reshape(-1) for t in self._tensors()])

    def unpacked(self, packed: Tensor) -> Rotation:
        """The rotation of this one's form whose ``packed`` begins the vector ``packed``, of which its tensors are views."""
        tensors = self._tensors()
        sizes = [t.numel() for t in tensors]
        parts = packed[: sum(sizes)].split(sizes)
        return self._with([part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    def _tensors(self) -> list[Tensor]:
        return [self.matrix] if self.matrix is not None else list(self.reflectors or ())

    def _with(self, tensors: list[Tensor]) -> Rotation:
        other = Rotation(None, self.n)
        if self.matrix is not None:
            (other.matrix,) = tensors
        elif self.reflectors is not None:
            v, y, signs = tensors
            other.reflectors = (v, y, signs)
        return other


def householder_wy(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V [n, r], T [r, r] and signs [r] in fp64 with Q = I - V T Vᵀ orthonormal and Q[:, :r] * signs = U.

    Raises ValueError where the columns of U are not orthonormal to 1e-3.
    """
    _check_orthonormal(columns)
    factored, tau = torch.geqrf(columns.double())
    signs = torch.sign(torch.diagonal(factored)).clone()
    v = torch.tril(factored, diagonal=-1) + torch.eye(*factored.shape, dtype=torch.float64, device=columns.device)
    # LAPACK writes tau = 0 for a column that needs no reflection: no reflector at all.
    skipped = tau == 0
    v[:, skipped] = 0.0
    inverse = torch.triu(v.T @ v, diagonal=1) + torch.diag(torch.where(skipped, torch.ones_like(tau), 1.0 / tau))
    eye = torch.eye(tau.numel(), dtype=torch.float64, device=columns.device)
    return v, torch.linalg.solve_triangular(inverse, eye, upper=True), signs


def _check_orthonormal(columns: Tensor) -> None:
    # A GPU may have been told to take fp32 products in TF32, whose error is as large as the bar.
    columns = columns.double() if columns.is_cuda else columns.float()
    gram = columns.T @ columns
    gram.diagonal().sub_(1.0)
    error = gram.abs().max().item() if gram.numel() else 0.0
    if not error <= 1e-3:
        raise ValueError(f"the stored basis is not orthonormal (largest error {error:.1e}); run phase 1 again")
