"""Data modules for experiments, named by the configs."""

from lightning_sparse.data.images import (
    CIFAR10,
    CIFAR100,
    MNIST,
    Digits,
    FashionMNIST,
    ImageData,
    ImageFolderData,
)
from lightning_sparse.data.loader import Augmentation, TensorLoader, augment
from lightning_sparse.data.teacher import Teacher, teacher_network

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Augmentation",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "ImageFolderData",
    "Teacher",
    "TensorLoader",
    "augment",
    "teacher_network",
]
