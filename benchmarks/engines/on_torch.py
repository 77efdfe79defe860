"""torch as a user would train the tail with it: autograd, ``clip_grad_norm_`` and AdamW.

The batches are tensors before the clock starts. ``torch_fused`` takes AdamW's fused CPU kernel;
``torch_compile`` has forward, loss and backward compiled for the batch's exact shape, with the
fused optimizer behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.engines.cases import TAILS
from benchmarks.engines.port import GEMM_SIZE, STUDENT, Arrays, Files, Pieces, Step
from benchmarks.engines.student import build_student
from edge_ll.manifest import LossTerms
from edge_ll_export.tail_loss import BATCH_NAMES, TailLoss


class Runner:
    """See :class:`benchmarks.engines.port.Runner`."""

    packages = ("torch", "numpy")

    def __init__(self, engine: str, threads: int, files: Files) -> None:
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        self._fused = engine != "torch_default"
        self._compiled = engine == "torch_compile"
        self._files = files

    def open(self, tail: str, batch: int) -> Step:
        """A step on tensors that are ready."""
        batches = [_tensors(arrays) for arrays in self._files.batches(tail, batch)]
        step = self._step(_with_theta(TAILS[tail].build(), self._files, tail))
        return lambda i: step(batches[i % len(batches)])

    def gemm(self) -> Callable[[], object]:
        """``torch.mm``."""
        a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE)
        out = torch.empty(GEMM_SIZE, GEMM_SIZE)
        return lambda: torch.mm(a, b, out=out)

    def student(self) -> Pieces:
        """The student as torch modules."""
        backbone, tail = build_student(np.load(self._files.waveforms()))
        step = self._step(_with_theta(tail, self._files, STUDENT))

        def latents(x: Any) -> Any:
            with torch.inference_mode():
                return backbone(torch.from_numpy(x)).numpy()

        return Pieces(latents, lambda arrays: step(_tensors(arrays)))

    def _step(self, tail: nn.Module) -> Callable[[list[torch.Tensor]], float]:
        learner = self._files.index()["learner"]
        module: Any = TailLoss(tail, LossTerms())
        if self._compiled:
            torch.compiler.reset()
            module = torch.compile(module, fullgraph=True, dynamic=False)
        parameters = list(tail.parameters())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=learner["learning_rate"],
            betas=learner["betas"],
            eps=learner["epsilon"],
            weight_decay=learner["weight_decay"],
            fused=self._fused,
        )

        def step(batch: list[torch.Tensor]) -> float:
            optimizer.zero_grad()
            loss: Any = module(*batch)[0]
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, learner["clip_norm"])
            optimizer.step()
            return float(loss.item())

        return step


def _tensors(arrays: Arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[name]) for name in BATCH_NAMES]


def _with_theta(tail: nn.Module, files: Files, name: str) -> nn.Module:
    theta, offset = torch.from_numpy(np.load(files.theta(name))), 0
    with torch.no_grad():
        for parameter in tail.parameters():
            part = theta[offset : offset + parameter.numel()]
            parameter.copy_(part.reshape(parameter.shape))
            offset += parameter.numel()
    return tail
