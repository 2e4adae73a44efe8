"Random embeddings and centres of crops, and the pairs that a loss may compare."
import torch

# ten crops of four volumes
VOLUME = torch.tensor([0, 0, 1, 2, 2, 2, 2, 7, 1, 0])

def draw(n=10, d=5, axes=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, d, generator=g, dtype=dtype), 3 * torch.randn(
        n, axes, generator=g, dtype=dtype
    )

def allowed(pairs, volume, n):
    def same(i, j): return volume[i] == volume[j]
    keep = {
        "all": lambda i, j: True,
        "off-diagonal": lambda i, j: i != j,
        "within": lambda i, j: i != j and same(i, j),
        "cross": lambda i, j: not same(i, j),
    }[pairs]
    return [(i, j) for i in range(n) for j in range(n) if keep(i, j)]
