"""One linear of a quantised checkpoint: its levels and scales where they lie, read some rows at a time.

plain       weight         int8  [out, in]
words       weight_packed  int32 [out, ⌈in·bits/32⌉], the lowest bits first, each level plus 2^(bits-1); weight_shape [2] says what is padding
row pairs   weight         uint8 [out/2, in], row 2i in the low four bits and row 2i+1 in the high ones, two's complement

weight_scale is [1] or [] for the whole weight, [out] or [out, 1] for its rows, [out, groups] for groups of a row.
Source: compressed-tensors, compressors/pack_quantized/helpers.py; ModelOpt, torch/export/quant_utils.py (pack_int4_in_uint8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from artifact.errors import CheckpointError
from artifact.given import INPUT_SCALE, WEIGHT_SCALE
from exporter.checkpoints.file_tensor import TORCH_DTYPES, FileTensor
from exporter.checkpoints.quantised_config import HINT, QuantisedConfig

PACKED, SHAPE, PRE_SCALE = "weight_packed", "weight_shape", "pre_quant_scale"
ZERO_POINTS = ("weight_zero_point", "input_zero_point")
ORDER = "weight_g_idx"
WORD, NIBBLE = 32, 4
LEVEL_TENSORS = {"plain": ("weight", "I8"), "words": (PACKED, "I32"), "row pairs": ("weight", "U8")}
"""Packing → the tensor that holds levels, and its dtype."""


@dataclass(frozen=True)
class QuantisedLinear:
    """Where a linear's integers lie; checked but for their values.

    Attributes:
        module: its path.
        shape: (out, in).
        config: how its levels are packed.
        stored: name of a tensor within the module → where it lies.
        group_size: weights that share a scale; 0 for a whole row.
    """

    module: str
    shape: tuple[int, int]
    config: QuantisedConfig
    stored: Mapping[str, FileTensor]
    group_size: int

    @property
    def dtype(self) -> str:
        """Stored type of the levels, in the config's words: ``INT8`` or ``INT4``."""
        return f"INT{self.config.given.bits}"

    def levels(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the levels; int8 [stop - start, in]."""
        name, _ = LEVEL_TENSORS[self.config.packing]
        if self.config.packing == "plain":
            return self.stored[name].read_rows(start, stop)
        if self.config.packing == "row pairs":
            pairs = self.stored[name].read_rows(start // 2, -(-stop // 2))
            both = torch.stack((pairs << NIBBLE, pairs), dim=1).view(torch.int8) >> NIBBLE  # [pairs, 2, in], the sign extended
            return both.view(-1, self.shape[1])[start % 2 : start % 2 + stop - start]
        return self._unpacked(self.stored[name].read_rows(start, stop))

    def scales(self, start: int, stop: int) -> Tensor:
        """Scales of those rows; float32 [stop - start, groups], one group where a row has one scale.

        Raises:
            CheckpointError: one is not finite and positive.
        """
        tensor = self.stored[WEIGHT_SCALE]
        whole = tensor.shape[0] != self.shape[0]
        scales = (tensor.read() if whole else tensor.read_rows(start, stop)).float()
        checked = _positive(f"{self.module}.{WEIGHT_SCALE}", scales)
        return checked.expand(stop - start).reshape(-1, 1) if whole else checked.reshape(stop - start, -1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Level × scale of those rows; float32 [stop - start, in], rounded once where the scale has more than 17 bits."""
        scales = self.scales(start, stop)
        if self.group_size:
            scales = scales.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]
        return self.levels(start, stop).float() * scales

    def input_scale(self) -> float | None:
        """The static scale of its input; None where the checkpoint has none.

        Raises:
            CheckpointError: not finite and positive.
        """
        tensor = self.stored.get(INPUT_SCALE)
        return None if tensor is None else float(_positive(f"{self.module}.{INPUT_SCALE}", tensor.read().float()))

    def check_values(self) -> None:
        """Look at what is small enough to be looked at on opening.

        Raises:
            CheckpointError: a zero point that is not zero, or a weight_shape of another shape.
        """
        for name in ZERO_POINTS:
            if name in self.stored and bool(self.stored[name].read().any()):
                raise _refused(self.module, f"{name} is not zero: asymmetric")
        if SHAPE in self.stored and tuple(self.stored[SHAPE].read().tolist()) != self.shape:
            raise _refused(self.module, f"{SHAPE} is {self.stored[SHAPE].read().tolist()}, config.json asks for {list(self.shape)}")

    def _unpacked(self, words: Tensor) -> Tensor:
        packed = words.contiguous().view(torch.uint8)  # little-endian, as safetensors stores it
        if self.config.given.bits == NIBBLE:
            packed = torch.stack((packed & 15, packed >> NIBBLE), dim=-1).flatten(1)
        offset = 1 << (self.config.given.bits - 1)
        return (packed[:, : self.shape[1]].to(torch.int16) - offset).to(torch.int8)


def find_linear(module: str, shape: tuple[int, int], config: QuantisedConfig, stored: Mapping[str, FileTensor]) -> QuantisedLinear:
    """A linear that the configuration says is quantised.

    Args:
        module: its path.
        shape: (out, in) that the model needs.
        config: how it is quantised.
        stored: name within the module → tensor, as the files have them.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape; columns in another order; asymmetric.
    """
    if ORDER in stored:
        raise _refused(module, f"{ORDER} is there: columns in another order (actorder)")
    level_name, dtype = LEVEL_TENSORS[config.packing]
    needed = [level_name, WEIGHT_SCALE, *([INPUT_SCALE] if config.given.activations == "static" else [])]
    for name in needed:
        if name not in stored:
            raise _refused(module, f"{name} is missing; there {'is' if len(stored) == 1 else 'are'} {', '.join(sorted(stored)) or 'nothing'}")
    if stored[level_name].dtype != dtype:
        raise _refused(module, f"{level_name} is {stored[level_name].dtype}, expected {dtype}")
    wanted = {"plain": shape, "words": (shape[0], -(-shape[1] * config.given.bits // WORD)), "row pairs": (shape[0] // 2, shape[1])}[config.packing]
    if stored[level_name].shape != wanted or (config.packing == "row pairs" and shape[0] % 2):
        raise _refused(module, f"{level_name} is {list(stored[level_name].shape)}, expected {list(wanted)} for a weight of {list(shape)}")
    for name in (WEIGHT_SCALE, INPUT_SCALE, PRE_SCALE):
        if name in stored and stored[name].dtype not in TORCH_DTYPES:
            raise _refused(module, f"{name} is {stored[name].dtype}, expected one of {', '.join(TORCH_DTYPES)}")
    _check_scale(module, shape, config.given.group_size, stored[WEIGHT_SCALE].shape)
    if INPUT_SCALE in stored and stored[INPUT_SCALE].shape not in ((), (1,)):
        raise _refused(module, f"{INPUT_SCALE} is {list(stored[INPUT_SCALE].shape)}, expected [1]")
    if PRE_SCALE in stored and stored[PRE_SCALE].shape != shape[1:]:
        raise _refused(module, f"{PRE_SCALE} is {list(stored[PRE_SCALE].shape)}, expected {list(shape[1:])}")
    linear = QuantisedLinear(module, shape, config, {name: _one_axis(tensor) for name, tensor in stored.items()}, config.given.group_size)
    linear.check_values()
    return linear


def _check_scale(module: str, shape: tuple[int, int], group_size: int, found: tuple[int, ...]) -> None:
    groups = -(-shape[1] // group_size) if group_size else 1
    allowed = [(shape[0], groups)] if group_size else [(shape[0], 1), shape[:1], (1,), ()]
    if found not in allowed:
        raise _refused(module, f"{WEIGHT_SCALE} is {list(found)}, expected {' or '.join(str(list(one)) for one in allowed[:2])}")


def _one_axis(tensor: FileTensor) -> FileTensor:
    """A number of no axis as one of one."""
    return tensor if tensor.shape else replace(tensor, shape=(1,), strides=(1,))


def _positive(name: str, values: Tensor) -> Tensor:
    bad = int((~(torch.isfinite(values) & (values > 0))).sum())
    if bad:
        raise CheckpointError(f"{name}: {bad} of {values.numel()} scales are not finite and positive", hint=HINT)
    return values


def _refused(module: str, reason: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint is quantised in a way that is not read: {module}: {reason}", hint=HINT)
