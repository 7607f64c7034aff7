"""The networks of the thesis (section 6.5.1). Instance norm is group norm with a group a channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InstanceNorm(nn.GroupNorm):
    """Each channel of each image to mean 0 and variance 1, then a learnt scale and shift."""

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.written_out(x) if torch.compiler.is_compiling() else super().forward(x)

    def written_out(self, x: Tensor) -> Tensor:
        """The same, for the compiler to fuse with what stands around it; group_norm stays a slower call of its own."""
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]


class ConvNet(nn.Module):
    """ConvNet-D: D times convolution 3 x 3, instance norm, ReLU, average pooling by 2; then one linear layer.

    The convolutions have no bias, which the norm would cancel.

    Args:
        channels: of the input.
        classes: outputs.
        size: (H, W) of the input, or one side.
        depth: D, 3 or 4 in the thesis. width: channels inside, 128 in the thesis.
        first_padding: of the first convolution; 3 in the released code for images of 28 x 28, which gives 32 x 32.

    Raises:
        ValueError: an image too small for so many poolings.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: int | tuple[int, int],
        depth: int = 3,
        width: int = 128,
        first_padding: int = 1,
    ):
        super().__init__()
        sides = [size, size] if isinstance(size, int) else list(size)
        inner = [n + 2 * first_padding - 2 for n in sides]
        if depth < 1 or min(inner) < 2**depth:
            raise ValueError(
                f"size={size} is too small for depth={depth}: each level halves it; give a depth from 1 to "
                f"{max(min(inner), 1).bit_length() - 1}"
            )
        self.padding = [first_padding] + [1] * (depth - 1)
        self.convs = nn.ModuleList(
            nn.Conv2d(width if i else channels, width, 3, padding=p, bias=False) for i, p in enumerate(self.padding)
        )
        self.norms = nn.ModuleList(InstanceNorm(width) for _ in range(depth))
        self.head = nn.Linear(width * (inner[0] >> depth) * (inner[1] >> depth), classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, K)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.avg_pool2d(F.relu(norm(conv(x))), 2)
        return self.head(x.flatten(1))

    def grouped(self, x: Tensor, weights: Sequence[Tensor], params: Mapping[str, Tensor]) -> Tensor:
        """Logits of G batches at once, each with convolution weights of its own, by grouped convolution.

        Args:
            x: (G, B, C, H, W).
            weights: for each convolution (G, out, in, 3, 3).
            params: by name, as of ``named_parameters``; all but the convolutions are taken from here.

        Returns:
            (G, B, K).
        """
        groups = len(x)
        h = x.transpose(0, 1).flatten(1, 2)
        for i, (weight, padding) in enumerate(zip(weights, self.padding, strict=True)):
            h = F.conv2d(h, weight.flatten(0, 1), padding=padding, groups=groups)
            scale, shift = (params[f"norms.{i}.{name}"].repeat(groups) for name in ("weight", "bias"))
            h = F.avg_pool2d(F.relu(F.group_norm(h, h.shape[1], scale, shift)), 2)
        h = h.unflatten(1, (groups, -1)).flatten(2)
        return F.linear(h, params["head.weight"], params["head.bias"]).transpose(0, 1)


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, pooled: bool):
        super().__init__()
        step = 1 if pooled else stride
        self.conv1, self.norm1 = nn.Conv2d(inner, outer, 3, step, 1, bias=False), InstanceNorm(outer)
        self.conv2, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), InstanceNorm(outer)
        self.pool = nn.AvgPool2d(2) if pooled and stride == 2 else nn.Identity()
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.skip = nn.Sequential(
                nn.AvgPool2d(2) if pooled and stride == 2 else nn.Identity(),
                nn.Conv2d(inner, outer, 1, step, bias=False),
                InstanceNorm(outer),
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


class ResNet10(nn.Module):
    """ResNet-10: a stem and four residual blocks of two convolutions, with instance norm.

    Args:
        channels: of the input.
        classes: outputs.
        size: (H, W) of the input, or one side; from 112 on the stem is 7 x 7 with stride 2 and pooling, below 3 x 3.
        width: channels of the first block, 64 in the thesis; they double with each further block.
        pooled: average pooling in place of strided convolutions: ResNetAP-10.

    Raises:
        ValueError: images with a side below 16, of which the last block would see one pixel.
    """

    def __init__(self, channels: int, classes: int, size: int | tuple[int, int], width: int = 64, pooled: bool = False):
        super().__init__()
        side = size if isinstance(size, int) else min(size)
        if side < 16:
            raise ValueError(f"size={size} is too small for ResNet-10, which halves it three times; give 16 or more")
        large = side >= 112
        self.stem = nn.Conv2d(channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.norm = InstanceNorm(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        widths = [width << i for i in range(4)]
        self.blocks = nn.Sequential(
            *(_Block(widths[max(i - 1, 0)], w, 1 if i == 0 else 2, pooled) for i, w in enumerate(widths))
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to logits (B, K)."""
        x = self.blocks(self.pool(F.relu(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class ResNetAP10(ResNet10):
    """:class:`ResNet10` with average pooling in place of strided convolutions, the thesis' network for ImageNet."""

    def __init__(self, channels: int, classes: int, size: int | tuple[int, int], width: int = 64):
        super().__init__(channels, classes, size, width, pooled=True)
