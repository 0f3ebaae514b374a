"""Models of other libraries, tiny and with random weights: each must become sparse as it is."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, LENGTH, WIDTH = 24, 6, 16


@dataclass(frozen=True)
class Foreign:
    """A model that somebody else has written, and what trains it.

    Args:
        family: how the page calls it.
        make: an untrained one.
        batch: what its training step is given, at random.
        loss: from the model and a batch.
        needs: the packages it is from.
        note: what whoever prunes it should know.
        targets: that leave out what cannot be pruned.
        refused: what the default targets are answered, if they are refused.
        optimizer: from the parameters.
    """

    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    needs: tuple[str, ...] = ()
    note: str = ""
    targets: tuple[str, ...] = ("*",)
    refused: str = ""
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(default=lambda parameters: torch.optim.AdamW(parameters, 1e-2))

    def model(self) -> nn.Module:
        """The same weights at every call; skips the test where a package is missing."""
        for package in self.needs:
            library(package)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn each other of
            torch.manual_seed(0)
            return self.make()


class Guest(L.LightningModule):
    """Trains a foreign model as it is."""

    def __init__(self, foreign: Foreign) -> None:
        super().__init__()
        self.model, self.foreign = foreign.model(), foreign

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.foreign.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.foreign.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])

    def on_train_epoch_start(self) -> None:
        optimizer: Any = self.trainer.optimizers[0]
        if hasattr(optimizer, "train"):  # schedulefree
            optimizer.train()

    def on_train_end(self) -> None:
        optimizer: Any = self.trainer.optimizers[0]
        if hasattr(optimizer, "eval"):  # the weights become an average that the optimizer keeps
            optimizer.eval()


class Batches:
    """The same random batches in every epoch; a run can resume inside an epoch."""

    def __init__(self, foreign: Foreign, count: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.batches = [foreign.batch() for _ in range(count)]
        self.served = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        first, self.served = self.served % len(self), self.served % len(self)
        for batch in self.batches[first:]:
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


def library(name: str) -> Any:
    """A package, if it is installed; what it warns of while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def part(path: str) -> Any:
    """Something by its full name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ---- batches and losses ----------------------------------------------------------------------------------------------


def tokens() -> Tensor:
    return torch.randint(TOKENS, (3, LENGTH))


def text() -> dict[str, Tensor]:
    words = tokens()
    return {"input_ids": words, "labels": words}


def labeled_text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": torch.randint(3, (3,))}


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 32, 32), torch.randint(4, (2,))


def graph() -> dict[str, Tensor]:
    return {
        "x": torch.rand(10, 8),
        "edge_index": torch.randint(10, (2, 30)),
        "labels": torch.randint(4, (10,)),
    }


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Of transformers."""
    return model(**batch).loss  # type: ignore[no-any-return]


def next_token(model: nn.Module, words: Tensor) -> Tensor:
    return F.cross_entropy(model(words)[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def classified(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def nodes(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["edge_index"]), batch["labels"])


def denoised(model: nn.Module, batch: Any) -> Tensor:
    noise, moment = batch
    return F.mse_loss(model(noise, moment), noise)


def summed(model: nn.Module, batch: Any) -> Tensor:
    """Of a detector, which names its losses."""
    return torch.stack(list(model(*batch).values())).sum()


# ---- models ----------------------------------------------------------------------------------------------------------


def from_config(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of transformers."""
    return lambda: part(f"transformers.{model}")(part(f"transformers.{config}")(**options))


DECODER = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Recurrent(nn.Module):
    """A language model whose head may share its weight with the embedding."""

    def __init__(self, kind: type[nn.RNNBase], tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.body = kind(WIDTH, WIDTH, 2, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(WIDTH, TOKENS)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(words))[0])  # type: ignore[no-any-return]


class Graph(nn.Module):
    """Two layers that pass messages."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "GINConv":
            make = part("torch_geometric.nn.MLP")
            sizes = [make([width, 16, 16], norm=None) for width in (8, 16)]
            self.layers = nn.ModuleList(part("torch_geometric.nn.GINConv")(mlp) for mlp in sizes)
        else:
            self.layers = nn.ModuleList(part(f"torch_geometric.nn.{kind}")(width, 16) for width in (8, 16))
        self.head = part("torch_geometric.nn.Linear")(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edges).relu()
        return self.head(x)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Like those of diffusion models: an image and a moment in, a shortcut around what is small."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.down, self.inner = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.attention = nn.GroupNorm(4, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.out = nn.ConvTranspose2d(24, 8, 2, 2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        small = F.silu(self.down(x))
        inner = F.silu(self.norm(self.inner(small) + self.time(moment[:, None])[:, :, None, None]))
        flat = inner.flatten(2).mT
        inner = inner + self.attention(flat, flat, flat, need_weights=False)[0].mT.view_as(inner)
        return self.out(self.up(torch.cat([small, inner], 1)))  # type: ignore[no-any-return]


class Reader(nn.Module):
    """A classifier of text, from parts of torch."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.body, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(WIDTH, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(words)).mean(1))  # type: ignore[no-any-return]


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: part("timm.create_model")(name, num_classes=4, **options)


def detector() -> nn.Module:
    detection = "torchvision.models.detection"
    body: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 4, 1), nn.ReLU())
    body.out_channels = 16
    return part(f"{detection}.FasterRCNN")(  # type: ignore[no-any-return]
        body,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=part(f"{detection}.anchor_utils.AnchorGenerator")(((16,),), ((1.0,),)),
        box_roi_pool=part("torchvision.ops.MultiScaleRoIAlign")(["0"], 2, 1),
        box_head=part(f"{detection}.faster_rcnn.TwoMLPHead")(16 * 4, 16),
        box_predictor=part(f"{detection}.faster_rcnn.FastRCNNPredictor")(16, 3),
    )


def scene() -> Any:
    box = torch.tensor([[4.0, 4.0, 28.0, 28.0]])
    return list(torch.rand(2, 3, 64, 64)), [{"boxes": box + i, "labels": torch.tensor([1])} for i in range(2)]


GPT2 = from_config(
    "GPT2LMHeadModel",
    "GPT2Config",
    vocab_size=TOKENS,
    n_positions=16,
    n_embd=WIDTH,
    n_layer=1,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)


def adapted() -> nn.Module:
    config = part("peft.LoraConfig")(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return part("peft.get_peft_model")(GPT2(), config)  # type: ignore[no-any-return]


EXPERTS = "each expert counts as a layer of its own; the router stays dense"
TIED = "the head shares its weight with the embedding and stays dense with it"
HF, PYG, TIMM = ("transformers",), ("torch_geometric",), ("timm",)

ZOO: dict[str, Foreign] = {
    "mixtral": Foreign(
        "Mixtral (transformers)",
        from_config(
            "MixtralForCausalLM",
            "MixtralConfig",
            **DECODER,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        text,
        own_loss,
        HF,
        EXPERTS,
    ),
    "qwen3-moe": Foreign(
        "Qwen3-MoE (transformers)",
        from_config(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            **DECODER,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        text,
        own_loss,
        HF,
        EXPERTS,
    ),
    "gpt-oss": Foreign(
        "gpt-oss (transformers)",
        from_config(
            "GptOssForCausalLM", "GptOssConfig", **DECODER, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
        ),
        text,
        own_loss,
        HF,
        f"experts hold their inputs first; {EXPERTS}",
    ),
    "gpt2": Foreign("GPT-2 (transformers)", GPT2, text, own_loss, HF, f"`Conv1D` holds its inputs first; {TIED}"),
    "bert": Foreign(
        "BERT (transformers)",
        from_config(
            "BertForSequenceClassification",
            "BertConfig",
            vocab_size=TOKENS,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.1,
        ),
        labeled_text,
        own_loss,
        HF,
        "`!classifier` keeps the new head dense",
    ),
    "t5": Foreign(
        "T5 (transformers)",
        from_config(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=TOKENS,
            d_model=WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        text,
        own_loss,
        HF,
        TIED,
    ),
    "vit": Foreign(
        "ViT (transformers)",
        from_config(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=16,
            num_labels=4,
        ),
        lambda: dict(zip(("pixel_values", "labels"), images(), strict=True)),
        own_loss,
        HF,
    ),
    "whisper": Foreign(
        "Whisper (transformers)",
        from_config(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=TOKENS,
            num_mel_bins=8,
            d_model=WIDTH,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=8,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        lambda: {"input_features": torch.rand(2, 8, 16), "labels": torch.randint(TOKENS, (2, LENGTH))},
        own_loss,
        HF,
        TIED,
    ),
    "wav2vec2": Foreign(
        "wav2vec 2.0 (transformers)",
        from_config(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            vocab_size=TOKENS,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_kernel=(4, 4),
            conv_stride=(2, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            num_labels=3,
            mask_time_prob=0.0,
            layerdrop=0.0,
        ),
        lambda: {"input_values": torch.rand(2, 64), "labels": torch.randint(3, (2,))},
        own_loss,
        HF,
        "one convolution has a weight norm, which computes its weight",
        ("!*.pos_conv_embed",),
        "is computed by a parametrization",
    ),
    "lora": Foreign(
        "GPT-2 with LoRA (peft)",
        adapted,
        text,
        own_loss,
        ("transformers", "peft"),
        "the base is frozen and left out; the adapters become sparse",
    ),
    "lstm": Foreign("LSTM language model", lambda: Recurrent(nn.LSTM), tokens, next_token, note="gates count as outputs"),
    "gru": Foreign("GRU language model", lambda: Recurrent(nn.GRU), tokens, next_token, note="gates count as outputs"),
    "tied-lstm": Foreign("LSTM with a tied head", lambda: Recurrent(nn.LSTM, True), tokens, next_token, note=TIED),
    "encoder": Foreign(
        "`nn.TransformerEncoder`",
        Reader,
        lambda: (tokens(), torch.randint(4, (3,))),
        classified,
        note="query, key and value are one matrix of three times as many outputs",
    ),
    "unet": Foreign("UNet of a diffusion model", UNet, lambda: (torch.rand(2, 3, 8, 8), torch.rand(2)), denoised),
    "gcn": Foreign("GCN (torch-geometric)", lambda: Graph("GCNConv"), graph, nodes, PYG),
    "gin": Foreign("GIN (torch-geometric)", lambda: Graph("GINConv"), graph, nodes, PYG),
    "gat": Foreign("GAT (torch-geometric)", lambda: Graph("GATConv"), graph, nodes, PYG, "the attention vectors stay dense"),
    "resnet": Foreign("ResNet (timm)", timm("test_resnet"), images, classified, TIMM),
    "convnext": Foreign("ConvNeXt (timm)", timm("test_convnext"), images, classified, TIMM),
    "efficientnet": Foreign("EfficientNet (timm)", timm("test_efficientnet"), images, classified, TIMM),
    "nfnet": Foreign(
        "NFNet (timm)",
        timm("test_nfnet"),
        images,
        classified,
        TIMM,
        "standardized convolutions subtract their mean from every weight, zeros included",
        ("!type:ScaledStdConv2d",),
        "is computed by the forward pass of ScaledStdConv2d",
    ),
    "detector": Foreign("Faster R-CNN (torchvision)", detector, scene, summed, ("torchvision",)),
    "schedulefree": Foreign(
        "LSTM trained by schedulefree",
        lambda: Recurrent(nn.LSTM),
        tokens,
        next_token,
        ("schedulefree",),
        "zeros hold for `optimizer.train()` and for `optimizer.eval()`",
        optimizer=lambda parameters: part("schedulefree.AdamWScheduleFree")(parameters, lr=1e-2),
    ),
}
