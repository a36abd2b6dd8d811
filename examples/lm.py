"""A small transformer language model on bytes: plain Lightning, it knows nothing of how it is parallelised."""

import math
import sysconfig
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY = 256  # every byte is a token


class Attention(nn.Module):
    """Causal self-attention, [batch, time, dim] -> [batch, time, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Let each position read the ones before it."""
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The feed-forward network of a block, dim -> width -> dim."""

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(dim, width)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Treat each position by itself."""
        return self.down(self.dropout(self.act(self.up(x))))


class Block(nn.Module):
    """Attention and a feed-forward network, each normalised before and added to the stream."""

    def __init__(self, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), FeedForward(dim, width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream [batch, time, dim] to itself."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class LanguageModel(L.LightningModule):
    """A decoder-only transformer that predicts the next byte.

    Args:
        dim: features of the stream; a multiple of heads.
        depth: number of blocks.
        heads: attention heads of a block.
        context: longest input, in bytes.
        width: hidden features of the feed-forward networks; None: 4 * dim.
        dropout: probability that a feature is dropped in training.
        lr: peak learning rate of AdamW; it warms up over a tenth of the steps, then falls to zero along a cosine.
    """

    def __init__(
        self,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        context: int = 128,
        width: int | None = None,
        dropout: float = 0.1,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Parameter(torch.empty(context, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, width or 4 * dim, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        for table in (self.embedding.weight, self.position):
            nn.init.normal_(table, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map bytes [batch, time] to logits of the byte after each, [batch, time, 256]; time is at most context."""
        x = self.dropout(self.embedding(tokens) + self.position[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the next byte, in nats."""
        tokens, following = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss, and the same in bits per byte."""
        loss = self.loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log("val_bits_per_byte", loss / math.log(2), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW on every parameter, one cycle over the steps of the run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Text(L.LightningDataModule):
    """Windows of a text, byte by byte; its end is held out for validation.

    Args:
        text: a file to read; None: the sources of this Python's standard library, one after the other by name.
        context: bytes of a window.
        batch_size: windows of a batch.
        max_bytes: how much of the text is used.
        held_out: the share of it that is kept for validation.
    """

    def __init__(
        self,
        text: str | None = None,
        context: int = 128,
        batch_size: int = 8,
        max_bytes: int = 2_000_000,
        held_out: float = 0.05,
    ) -> None:
        super().__init__()
        self.text, self.context, self.batch_size = text, context, batch_size
        self.max_bytes, self.held_out = max_bytes, held_out

    def setup(self, stage: str) -> None:
        """Read the text and cut it into windows."""
        source, content = self._read()
        split = round(len(content) * (1 - self.held_out))
        self.train, self.validation = self._windows(content[:split]), self._windows(content[split:])
        if len(self.train) < self.batch_size or not len(self.validation):
            raise ValueError(
                f"{source}: {len(content)} bytes give {len(self.train)} windows of context={self.context} to train "
                f"on and {len(self.validation)} to validate on; a batch of {self.batch_size} and one window are "
                f"needed. Give a longer text, or a smaller context or batch_size."
            )

    def _read(self) -> tuple[str, bytes]:
        if self.text is not None:
            path = Path(self.text)
            if not path.is_file():
                raise FileNotFoundError(f"text={self.text!r}: there is no such file in {Path.cwd()}.")
            return f"text={self.text!r}", path.read_bytes()[: self.max_bytes]
        library = Path(sysconfig.get_path("stdlib"))
        content = bytearray()
        for path in sorted(library.glob("*.py")):
            content += path.read_bytes()
            if len(content) >= self.max_bytes:
                break
        return f"the sources in {library}", bytes(content[: self.max_bytes])

    def _windows(self, content: bytes) -> TensorDataset:
        """Windows side by side, and the same one byte on."""
        stream = torch.tensor(list(content), dtype=torch.long)
        count = max(0, (len(stream) - 1) // self.context)
        tokens, following = (stream[i : i + count * self.context].view(count, self.context) for i in (0, 1))
        return TensorDataset(tokens, following)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of one size."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """The end of the text."""
        return DataLoader(self.validation, batch_size=self.batch_size)

    test_dataloader = val_dataloader
