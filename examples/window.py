"""A deep feed-forward network that predicts the next byte of a text from the ones before it: plain Lightning.

It knows nothing of how it is parallelised. All its weight lies in wide linears, one after the other.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from examples.lm import VOCABULARY, Text


class Layer(nn.Module):
    """A linear and a ReLU, inputs -> outputs, beside an identity skip where asked for."""

    def __init__(self, inputs: int, outputs: int, skip: bool) -> None:
        super().__init__()
        self.linear, self.act, self.skip = nn.Linear(inputs, outputs), nn.ReLU(), skip

    def forward(self, x: Tensor) -> Tensor:
        """Map features [batch, inputs] to [batch, outputs]."""
        y = self.act(self.linear(x))
        return x + y if self.skip else y


class NextByte(L.LightningModule):
    """Embeddings of a window of bytes side by side, a deep network on them, and the logits of the byte that follows.

    Args:
        window: bytes that are read.
        embedding: features of each; the network reads and returns window * embedding features.
        depth: linears of the network, at least 2.
        width: features between them; None: window * embedding.
        skips: whether what lies between equal widths has identity skips.
        lr: peak learning rate of Adam; it warms up over a tenth of the steps, then falls to zero along a cosine.
    """

    def __init__(
        self,
        window: int = 16,
        embedding: int = 64,
        depth: int = 3,
        width: int | None = None,
        skips: bool = False,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        features = window * embedding
        widths = [features, *[width or features] * (depth - 1), features]
        self.embedding = nn.Embedding(VOCABULARY, embedding)
        self.net = nn.Sequential(
            *(Layer(widths[n], widths[n + 1], skips and 0 < n < depth - 1) for n in range(depth)),
        )
        self.head = nn.Linear(features, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map bytes [batch, window] to logits of the next, [batch, 256]."""
        return self.head(self.net(self.embedding(tokens).flatten(1)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch, in nats."""
        tokens, following = batch
        loss = F.cross_entropy(self(tokens), following)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the cross-entropy, in nats."""
        tokens, following = batch
        self.log("val_loss", F.cross_entropy(self(tokens), following), prog_bar=True, sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> dict[str, object]:
        """Adam on every parameter, one cycle over the steps of the run."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Windows(Text):
    """Every window of a text and the byte after it; of what is held out, every eighth."""

    def __init__(self, text: str | None = None, window: int = 16, batch_size: int = 128) -> None:
        super().__init__(text, window, batch_size)

    def _windows(self, content: bytes) -> TensorDataset:
        stream = torch.tensor(list(content), dtype=torch.int32)
        return TensorDataset(stream[:-1].unfold(0, self.context, 1), stream[self.context :].long())

    def val_dataloader(self) -> DataLoader:
        """The end of the text."""
        return DataLoader(Subset(self.validation, range(0, len(self.validation), 8)), batch_size=1024)

    test_dataloader = val_dataloader
