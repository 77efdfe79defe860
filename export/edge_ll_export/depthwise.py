"""A depthwise convolution as a product with a small banded matrix.

ONNX Runtime's CPU kernel for a depthwise ``Conv`` whose weights are not constants handles one
channel of one sample at a time, and its weight gradient takes even longer. But a convolution is
linear: for one channel it maps a tile of input rows to a tile of output rows by a banded (Toeplitz)
matrix, the same for all tiles and samples. So the convolution is one batched product, channel by
channel, and so are its gradients. The products do more arithmetic than the convolution, most of it
with zeros, but matrix products are what the runtime does fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxscript import opset18 as op

_COPY = 30  # what copying a number into a tile costs, in multiplications
_TYPICAL_BATCH = 32
_MOST_TILES = 8
_MOST_BYTES = 16 << 20  # a device holds it a few times in a step


@dataclass(frozen=True)
class DepthwisePlan:
    """How the rows of a map are cut.

    Attributes:
        channels: C.
        map: Height and width of input and output, which are the same.
        kernel: Height and width.
        padding: Rows and columns of zeros on both sides.
        rows: Output rows of one tile; divides the height.
        flipped: Whether the kernel is turned by 180 degrees.
    """

    channels: int
    map: tuple[int, int]
    kernel: tuple[int, int]
    padding: tuple[int, int]
    rows: int
    flipped: bool = False

    @classmethod
    def of(
        cls,
        shape: Sequence[Any],
        weight_shape: Sequence[Any],
        padding: Sequence[int],
        groups: int,
    ) -> DepthwisePlan:
        """The plan for a convolution of ``shape`` [N, C, H, W].

        Raises:
            ValueError: It is not depthwise, its output has another size than its input, or the map
                is too large.
        """
        channels, height, width = (int(axis) for axis in shape[1:])
        outputs, inputs, *kernel = (int(axis) for axis in weight_shape)
        same = all(2 * p == k - 1 for p, k in zip(padding, kernel, strict=True))
        if not channels == groups == outputs or inputs != 1 or not same:
            raise ValueError(
                "a convolution in groups must be depthwise and keep the size: expected "
                f"{channels} groups and padding {[(k - 1) // 2 for k in kernel]}, got {groups} "
                f"groups, weight {[outputs, inputs, *kernel]}, padding {list(padding)}"
            )
        candidates = [rows for rows in range(1, height + 1) if height % rows == 0]
        plan = cls(
            channels=channels,
            map=(height, width),
            kernel=(kernel[0], kernel[1]),
            padding=(padding[0], padding[1]),
            rows=height,
        )
        plans = [replace(plan, rows=rows) for rows in candidates if height // rows <= _MOST_TILES]
        best = min(plans, key=lambda p: p.cost)
        if best.matrix_bytes > _MOST_BYTES:
            raise ValueError(
                f"a depthwise convolution on a map of {height} x {width} with {channels} channels "
                f"would take a matrix of {best.matrix_bytes:,} bytes, expected at most "
                f"{_MOST_BYTES:,}; take a smaller map, or one whose height has small divisors"
            )
        return best

    @property
    def whole(self) -> bool:
        """Whether one tile takes the whole map: then nothing is cut, and no zeros are added."""
        return self.rows == self.map[0]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Inputs and outputs of one tile."""
        height, width = self.map
        taken = height if self.whole else self.rows + self.kernel[0] - 1
        return taken * width, self.rows * width

    @property
    def matrix_bytes(self) -> int:
        """Of the banded matrices of all channels, in float32."""
        return 4 * self.channels * math.prod(self.matrix_shape)

    @property
    def cost(self) -> float:
        """Multiplications for each output, copies and the making of the matrix included.

        It orders the plans as the clock does, but for near ties: docs/research/step-graph.md.
        """
        inputs, outputs = self.matrix_shape
        making = math.prod(self.kernel) * inputs * outputs / (_TYPICAL_BATCH * math.prod(self.map))
        return inputs + making + (0 if self.whole else _COPY * inputs / outputs)

    def backward(self) -> DepthwisePlan:
        """The plan that takes the output's gradient to the input's: the flipped kernel."""
        return replace(self, flipped=not self.flipped)

    def tiles(self, x: Any) -> Any:
        """[N, C, H, W] to [C, tiles * N, inputs of one tile]; tile by tile, so copies are long."""
        height, width = self.map
        flat = op.Reshape(self._channels_first(x), _ints(self.channels, -1, height * width))
        if self.whole:
            return flat
        margin = self.padding[0] * width
        padded = op.Pad(flat, _ints(0, 0, margin, 0, 0, margin))
        inputs, outputs = self.matrix_shape
        cuts = [
            op.Slice(padded, _ints(at), _ints(at + inputs), _ints(2))
            for at in range(0, height * width, outputs)
        ]
        return op.Concat(*cuts, axis=1)

    def matrix(self, weight: Any) -> Any:
        """The banded matrix of every channel, [C, inputs, outputs]."""
        taps = op.Reshape(weight, _ints(self.channels, -1))
        return op.Reshape(op.MatMul(taps, self._basis()), _ints(self.channels, *self.matrix_shape))

    def apply(self, tiles: Any, matrix: Any) -> Any:
        """The convolution: [C, tiles * N, inputs] to [N, C, H, W]."""
        _, outputs = self.matrix_shape
        result = op.MatMul(tiles, matrix)
        if self.whole:
            moved = op.Transpose(result, perm=[1, 0, 2])
        else:
            cut = op.Reshape(result, _ints(self.channels, self._tiles, -1, outputs))
            moved = op.Transpose(cut, perm=[2, 0, 1, 3])
        return op.Reshape(moved, _ints(-1, self.channels, *self.map))

    def weight_gradient(self, tiles: Any, gradient: Any) -> Any:
        """From the input's tiles and the output's gradient [N, C, H, W]: [C, 1, kernel]."""
        _, outputs = self.matrix_shape
        if self.whole:
            moved = self._channels_first(gradient)
        else:
            cut = op.Reshape(gradient, _ints(-1, self.channels, self._tiles, outputs))
            moved = op.Transpose(cut, perm=[1, 2, 0, 3])
        by_output = op.Reshape(moved, _ints(self.channels, -1, outputs))
        by_matrix = op.MatMul(op.Transpose(tiles, perm=[0, 2, 1]), by_output)
        flat = op.Reshape(by_matrix, _ints(self.channels, -1))
        taps = op.MatMul(flat, op.Transpose(self._basis(), perm=[1, 0]))
        return op.Reshape(taps, _ints(self.channels, 1, *self.kernel))

    @property
    def _tiles(self) -> int:
        return self.map[0] // self.rows

    def _channels_first(self, x: Any) -> Any:
        return op.Transpose(x, perm=[1, 0, 2, 3])

    def _basis(self) -> Any:
        """Where each tap stands in the matrix, as a constant float32 [taps, inputs * outputs].

        Kept as bytes in the file: the runtime makes it float32 once, when it loads the graph.
        """
        ones: Any = op.Constant(value=onnx.numpy_helper.from_array(self.basis(), "band"))
        return op.Cast(ones, to=onnx.TensorProto.FLOAT)

    def basis(self) -> npt.NDArray[np.uint8]:
        """One where a tap multiplies an input into an output, uint8 [taps, inputs * outputs]."""
        width, (k_height, k_width) = self.map[1], self.kernel
        above = 0 if not self.whole else self.padding[0]
        inputs, outputs = self.matrix_shape
        ones = np.zeros((k_height * k_width, inputs, outputs), np.uint8)
        for row, column in np.ndindex(self.rows, width):
            for dy, dx in np.ndindex(k_height, k_width):
                y, x = row + dy - above, column + dx - self.padding[1]
                if 0 <= y < inputs // width and 0 <= x < width:
                    tap = dy * k_width + dx
                    tap = len(ones) - 1 - tap if self.flipped else tap
                    ones[tap, y * width + x, row * width + column] = 1
        return ones.reshape(len(ones), -1)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))
