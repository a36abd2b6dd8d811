"""Handwritten digits with a training loop of one's own, on two ranks: `python examples/fabric_digits.py`."""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_phantom.strategies.fabric import PhantomFabricStrategy


def main(devices: int = 2, epochs: int = 8, width: int = 256) -> float:
    """Train on the CPU, save, and return the share of held-out digits that are recognised."""
    strategy = PhantomFabricStrategy(num_blocks=4)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0)

    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, held_out = random_split(digits, [0.8, 0.2])
    train_loader, held_out_loader = fabric.setup_dataloaders(
        DataLoader(train, batch_size=64 // devices, shuffle=True, drop_last=True), DataLoader(held_out, batch_size=64)
    )

    model = nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)  # layers are swapped here, and the optimizer follows
    loss = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for x, y in train_loader:
            fabric.backward(loss(model(x), y))
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        right = torch.cat([(model(x).argmax(-1) == y).float() for x, y in held_out_loader])
    accuracy = float(fabric.all_reduce(right.mean()))
    fabric.save("digits.ckpt", {"model": model, "optimizer": optimizer})
    fabric.print(f"accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
