"""Small networks of the shapes that people use: how they write their blocks, not what they are for."""

import torch
from torch import nn
from torch.nn import functional


class PostActivation(nn.Module):
    """CIFAR ResNet, He et al. (2016): shortcuts that subsample and pad where the shape changes."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.more = outside - inside

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.more:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        out += x
        return functional.relu(out)


class PreActivation(nn.Module):
    """Pre-activation block whose projection exists only where shapes change."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))

    def forward(self, x):
        out = functional.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(functional.relu(self.bn2(out)))
        out += shortcut
        return out


class Bottleneck(nn.Module):
    """As in torchvision: one in-place activation used three times, ``downsample`` or None."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv3, self.bn3 = nn.Conv2d(outside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Gated(PostActivation):
    """SE-ResNet with the gate in the code of the block, not in a module."""

    def __init__(self, inside, outside, stride=1):
        super().__init__(inside, outside, stride)
        self.fc1, self.fc2 = nn.Conv2d(outside, 2, 1), nn.Conv2d(2, outside, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        gate = functional.relu(self.fc1(functional.avg_pool2d(out, out.size(2))))
        out = out * torch.sigmoid(self.fc2(gate))
        out += self.shortcut(x)
        return functional.relu(out)


class Staged(nn.Module):
    """Stem, two stages of blocks, pooling, head."""

    def __init__(self, block, last_norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(block(6, 6), block(6, 6))
        self.layer2 = nn.Sequential(block(6, 8, 2), block(8, 8))
        self.norm = nn.BatchNorm2d(8) if last_norm else nn.Identity()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


class DropPath(nn.Module):
    """Drops whole samples of its input in training mode, as in timm."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class PathOfAnotherName(DropPath):
    """The same under a name that says nothing."""


class Squeeze(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x):
        gate = torch.sigmoid(self.fc2(functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return gate * x


class MBConv(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        wide = 2 * inside
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU()),
            nn.Sequential(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide), nn.BatchNorm2d(wide), nn.SiLU()),
            Squeeze(wide),
            nn.Sequential(nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside)),
        )
        self.stochastic_depth = PathOfAnotherName(0.1)
        self.residual = stride == 1 and inside == outside

    def forward(self, x):
        out = self.block(x)
        if self.residual:
            out = self.stochastic_depth(out)
            out += x
        return out


class EfficientNet(nn.Module):
    """Blocks of which only those that keep the shape are residual; their drop-path modules are everywhere."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), MBConv(4, 4, 1), MBConv(4, 6, 2), MBConv(6, 6, 1), MBConv(6, 6, 1)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(width, width, 7, padding=3, groups=width))
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(0.5 * torch.ones(width, 1, 1))

    def forward(self, x):
        out = self.block(x).permute(0, 2, 3, 1)
        out = self.down(functional.gelu(self.up(self.norm(out)))).permute(0, 3, 1, 2)
        return x + self.layer_scale * out


class ConvNeXt(nn.Module):
    """The branch ends in a product in the code of the block."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 4, 4), ConvNeXtBlock(6), ConvNeXtBlock(6), nn.Conv2d(6, 8, 2, 2), ConvNeXtBlock(8)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop_path = DropPath(0.2)

    def forward(self, x):
        x = x + self.drop_path(self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.channels(self.norm2(x)))


class Mixer(nn.Module):
    """One drop-path module that is called twice in every block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(16, 8), MixerBlock(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class ViTBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, width))

    def forward(self, tokens):
        x = self.ln_1(tokens)
        x, _ = self.attention(x, x, x, need_weights=False)
        x = self.dropout(x)
        x = x + tokens
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    """A class token, positions that are learnt, attention that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.layers = nn.Sequential(ViTBlock(8), ViTBlock(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.layers(x)[:, 0])


class Attention(nn.Module):
    """Returns its output and the weights, as many libraries do."""

    def __init__(self, width, causal=False):
        super().__init__()
        self.qkv, self.proj, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        weights = scores.softmax(-1)
        return self.proj(weights @ v), weights


class SwinBlock(nn.Module):
    def __init__(self, width, shift):
        super().__init__()
        self.norm1, self.attn, self.shift = nn.LayerNorm(width), Attention(width), shift
        self.drop_path = DropPath(0.0)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.table = nn.Parameter(torch.randn(9))

    def forward(self, x):
        B, H, W, C = x.shape
        windows = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        windows = windows.view(B, H // 2, 2, W // 2, 2, C).transpose(2, 3).reshape(-1, 4, C)
        windows = self.attn(windows)[0] + self.table[torch.arange(4)].view(1, 4, 1)
        out = windows.view(B, H // 2, W // 2, 2, 2, C).transpose(2, 3).reshape(B, H, W, C)
        x = x + self.drop_path(torch.roll(out, (self.shift, self.shift), (1, 2)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Swin(nn.Module):
    """Windows are stacked along the samples inside a branch; patches are merged between stages."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.stage1 = nn.Sequential(SwinBlock(8, 0), SwinBlock(8, 1))
        self.merge = nn.Linear(32, 12, bias=False)
        self.stage2 = nn.Sequential(SwinBlock(12, 0))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stage1(self.stem(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.head(self.stage2(self.merge(x)).mean((1, 2)))


class GPTBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, causal=True)
        self.c_fc, self.c_proj = nn.Linear(width, 16), nn.Linear(16, width)

    def mlp(self, x):
        x = self.c_fc(x)  # the older form of GELU: an addition of x and a power of it
        return self.c_proj(0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))[0]
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens in, logits and a loss that is None out."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.h = nn.ModuleList([GPTBlock(8), GPTBlock(8)])
        self.ln_f, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x)), None


class Encoder(nn.Module):
    """Layers of torch itself, for (T, B, D) or (B, T, D)."""

    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=batch_first, norm_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


class Tuples(nn.Module):
    """Attention used straight from its tuple, after the addition a normalisation."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)])
        self.norm = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])

    def forward(self, x):
        for attn, norm in zip(self.attn, self.norm, strict=True):
            x = norm(x + attn(x, x, x)[0])
        return x


class Shared(nn.Module):
    """One block, applied several times."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for _ in range(3):
            x = torch.add(x, self.block(x))
        return self.head(x)


class UNet(nn.Module):
    """Early states are concatenated with later ones; the blocks in between are residual."""

    def __init__(self, join):
        super().__init__()
        self.stem, self.join = nn.Conv2d(3, 4, 3, padding=1), join
        self.down, self.mid, self.up = PostActivation(4, 4), PostActivation(4, 4), PostActivation(4, 4)
        self.merge = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        early = self.down(self.stem(x))
        late = self.mid(functional.avg_pool2d(early, 2))
        late = functional.interpolate(late, scale_factor=2.0)
        joined = self.merge(torch.cat([early, late], 1)) if self.join == "concatenate" else early + late
        return self.up(joined)


def images(n=2, side=32):
    return torch.randn(n, 3, side, side)


def vectors(*shape):
    return torch.randn(*shape, 8)


# name: (model, inputs of n samples, names of the sites, calls of each, axis of the samples)
ARCHITECTURES = {
    "post-activation": (
        lambda: Staged(PostActivation),
        lambda n: images(n, 8),
        [f"layer{i}.{j}.bn2" for i in (1, 2) for j in (0, 1)],
        1,
        0,
    ),
    "pre-activation": (
        lambda: Staged(PreActivation, last_norm=True),
        lambda n: images(n, 8),
        [f"layer{i}.{j}.conv2" for i in (1, 2) for j in (0, 1)],
        1,
        0,
    ),
    "bottleneck": (
        lambda: Staged(Bottleneck),
        lambda n: images(n, 8),
        [f"layer{i}.{j}.bn3" for i in (1, 2) for j in (0, 1)],
        1,
        0,
    ),
    "squeeze": (
        lambda: Staged(Gated),
        lambda n: images(n, 8),
        [f"layer{i}.{j}:0" for i in (1, 2) for j in (0, 1)],
        1,
        0,
    ),
    "efficientnet": (
        EfficientNet,
        lambda n: images(n, 16),
        [f"features.{i}.stochastic_depth" for i in (1, 3, 4)],
        1,
        0,
    ),
    "convnext": (ConvNeXt, images, [f"features.{i}:0" for i in (1, 2, 4)], 1, 0),
    "mixer": (Mixer, images, ["blocks.0.drop_path", "blocks.1.drop_path"], 2, 0),
    "vit": (ViT, images, [f"layers.{i}.{end}" for i in (0, 1) for end in ("dropout", "mlp")], 1, 0),
    "swin": (Swin, images, ["stage1.0.drop_path", "stage1.1.drop_path", "stage2.0.drop_path"], 2, 0),
    "gpt": (
        GPT,
        lambda n: torch.randint(11, (1, 6)).expand(n, 6).clone() if n > 2 else torch.randint(11, (n, 6)),
        [f"h.{i}.{end}" for i in (0, 1) for end in ("attn", "c_proj")],
        1,
        0,
    ),
    "encoder (T, B, D)": (
        lambda: Encoder(False),
        lambda n: vectors(5, n),
        [f"encoder.layers.{i}.dropout{k}" for i in (0, 1) for k in (1, 2)],
        1,
        1,
    ),
    "encoder (B, T, D)": (
        lambda: Encoder(True),
        lambda n: vectors(n, 5),
        [f"encoder.layers.{i}.dropout{k}" for i in (0, 1) for k in (1, 2)],
        1,
        0,
    ),
    "tuples": (Tuples, lambda n: vectors(n, 5), ["attn.0", "attn.1"], 1, 0),
    "shared": (Shared, lambda n: vectors(n), ["block"], 3, 0),
}
