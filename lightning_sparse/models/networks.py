"""Small reference networks. All take the number of classes, image channels and image size as their first arguments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.core import check_whole

__all__ = ["MLP", "VGG", "LeNet5", "LeNet300", "ResNet", "TorchvisionNetwork", "VisionTransformer", "WideResNet"]


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, optionally with batch normalization.

    Args:
        num_classes: number of outputs.
        in_channels: number of image channels.
        image_size: height and width of the image.
        hidden: width of each hidden layer.
        batch_norm: add batch normalization after each hidden linear layer.
        kaiming: initialize weights so that signals keep their scale (He et al. 2015), and biases with zero. Deep networks
            without batch normalization need this, otherwise signals fade. False uses the initialization of nn.Linear.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        hidden: Sequence[int] = (256, 256),
        batch_norm: bool = False,
        kaiming: bool = False,
    ) -> None:
        for number, size in enumerate(hidden):
            check_whole(f"hidden[{number}]", size, 1)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise([in_channels * image_size**2, *hidden]):
            layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if batch_norm else []), nn.ReLU()]
        last = hidden[-1] if hidden else in_channels * image_size**2
        super().__init__(*layers, nn.Linear(last, num_classes))
        for layer in self if kaiming else ():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)


class LeNet300(MLP):
    """LeNet-300-100: 266,200 weights on 28x28 images (LeCun et al. 1998)."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__(num_classes, in_channels, image_size, hidden=(300, 100))


class LeNet5(nn.Module):
    """LeNet-5 as used in the pruning literature: 20 and 50 filters of 5x5, 500 hidden units, 430,500 weights on 28x28.

    Source: Han et al. 2015, https://arxiv.org/abs/1506.02626, table 4 (431 thousand parameters).
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"LeNet5 needs images of at least 16 pixels, not image_size={image_size}; use MLP or ResNet.")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * side**2, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        out: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return out


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class _CIFARNet(nn.Module):
    """Stem, three stages of residual blocks at full, half and quarter resolution, pooling, classifier."""

    def __init__(self, num_classes: int, in_channels: int, blocks: Sequence[int], widths: Sequence[int], stem: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        stages, channels = [], stem
        for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for block in range(depth):
                layers.append(_Block(channels, width, 2 if stage > 0 and block == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class ResNet(_CIFARNet):
    """The ResNet for small images, with convolutional shortcuts: depth 20, 32, 44, 56, ...

    Source: He et al. 2015, "Deep Residual Learning", https://arxiv.org/abs/1512.03385, section 4.2.

    Args:
        num_classes: number of outputs.
        in_channels: number of image channels.
        image_size: not used; any size from 4 pixels works.
        depth: number of layers, 6n + 2.
        width: factor for the widths 16, 32, 64; with 2, depth 32 is the ResNet-32 of the pruning literature.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, depth: int = 20, width: float = 1
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6n + 2; choose 20, 32, 44, 56 or another such depth.")
        _check_width(width)
        widths = [max(1, round(base * width)) for base in (16, 32, 64)]
        super().__init__(num_classes, in_channels, [(depth - 2) // 6] * 3, widths, widths[0])


class WideResNet(_CIFARNet):
    """A wide residual network, specified by its blocks: [2, 3, 3] is WRN-18, [1, 2, 2] WRN-12, [3, 4, 3] WRN-22.

    Source: Zagoruyko and Komodakis 2016, "Wide Residual Networks", https://arxiv.org/abs/1605.07146; with the stages used in
    the experiments on Lp spheres.

    Args:
        num_classes: number of outputs.
        in_channels: number of image channels.
        image_size: not used; any size from 4 pixels works.
        blocks: residual blocks per stage.
        width: factor for the widths 16, 32, 64; the stem keeps 16.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        blocks: Sequence[int] = (2, 3, 3),
        width: int = 1,
    ) -> None:
        if len(blocks) != 3:
            raise ValueError(f"blocks={list(blocks)} must name three stages, such as [2, 3, 3].")
        for number, count in enumerate(blocks):
            check_whole(f"blocks[{number}]", count, 1)
        check_whole("width", width, 1)
        super().__init__(num_classes, in_channels, blocks, [16 * width, 32 * width, 64 * width], 16)


class VGG(nn.Module):
    """VGG-19 with batch normalization for small images: 16 convolutions and one linear layer.

    Source: Simonyan and Zisserman 2014, https://arxiv.org/abs/1409.1556; with a single linear layer as the classifier, as in
    the pruning literature.

    Args:
        num_classes: number of outputs.
        in_channels: number of image channels.
        image_size: at least 16; the last pooling covers whatever size is left.
        width: factor for all widths.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, width: float = 1) -> None:
        super().__init__()
        if image_size < 16:
            raise ValueError(f"VGG needs images of at least 16 pixels, not image_size={image_size}; use ResNet.")
        _check_width(width)
        layers: list[nn.Module] = []
        channels = in_channels
        for group, (base, depth) in enumerate([(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]):
            layers += [nn.MaxPool2d(2)] if group else []
            for _ in range(depth):
                outputs = max(1, round(base * width))
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, (2 / (9 * module.in_channels)) ** 0.5)
                nn.init.zeros_(module.bias) if module.bias is not None else None
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x).flatten(1))
        return out


class VisionTransformer(nn.Module):
    """A small pre-norm vision transformer (Dosovitskiy et al. 2021) that classifies the mean over tokens.

    Args:
        num_classes: number of outputs.
        in_channels: number of image channels.
        image_size: height and width of the image.
        patch_size: height and width of a patch; must divide `image_size`.
        width: embedding dimension.
        depth: number of blocks.
        heads: number of attention heads; must divide `width`.
        dropout: dropout rate in each block.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        patch_size: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size} must divide image_size={image_size}.")
        if width % heads:
            raise ValueError(f"heads={heads} must divide width={width}.")
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(nn.init.normal_(torch.empty(1, (image_size // patch_size) ** 2, width), std=0.02))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.head(self.blocks(tokens).mean(1))
        return out


class TorchvisionNetwork(nn.Module):
    """Any classifier from torchvision, by name.

    Args:
        num_classes: number of outputs.
        in_channels: must be 3, as torchvision's networks require.
        image_size: not used; see torchvision for the smallest size of each network.
        model: name of the network, such as `resnet18` or `vit_b_16`; see `torchvision.models.list_models()`.
        weights: pretrained weights such as `DEFAULT`; the last linear layer is then replaced by a new one for `num_classes`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        model: str = "resnet18",
        weights: str | None = None,
    ) -> None:
        super().__init__()
        import torchvision

        if model not in torchvision.models.list_models(module=torchvision.models):
            raise ValueError(f"model='{model}' is no classifier of torchvision; see torchvision.models.list_models().")
        if in_channels != 3:
            raise ValueError(f"model='{model}' wants three channels, not in_channels={in_channels}; use ResNet or MLP.")
        if weights is None:
            self.network: nn.Module = torchvision.models.get_model(model, num_classes=num_classes)
            return
        self.network = torchvision.models.get_model(model, weights=weights)
        name, last = [(n, m) for n, m in self.network.named_modules() if isinstance(m, nn.Linear)][-1]
        self.network.set_submodule(name, nn.Linear(last.in_features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


def _check_width(width: float) -> None:
    if not 0 < width < float("inf"):
        raise ValueError(f"width={width} must be above 0: a factor on all widths.")
