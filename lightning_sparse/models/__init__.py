"""Reference networks and a classifier for them; the library does not import them, configurations name them."""

from lightning_sparse.models.classifier import Classifier
from lightning_sparse.models.networks import (
    MLP,
    VGG,
    LeNet5,
    LeNet300,
    ResNet,
    TorchvisionNetwork,
    VisionTransformer,
    WideResNet,
)
from lightning_sparse.models.regressor import Regressor

__all__ = [
    "MLP",
    "VGG",
    "Classifier",
    "LeNet5",
    "LeNet300",
    "Regressor",
    "ResNet",
    "TorchvisionNetwork",
    "VisionTransformer",
    "WideResNet",
]
