"""The classes of docs/models.md for open_clip, BiomedCLIP and CheXzero, over stand-ins of both
libraries that have their interface: the weights are not to be had here, nor is torchvision."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmclip
from tests.commands import start
from tests.dual_encoders import ByHand, save_clip

OPEN_CLIP = '''
"""As open_clip 2.24 and later: create_model_from_pretrained and get_tokenizer."""
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

FOLDER = {folder!r}

class CLIP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.whole = CLIPModel.from_pretrained(FOLDER)
        self.logit_scale = self.whole.logit_scale
    def encode_image(self, image, normalize=False):
        assert image.ndim == 4 and not normalize
        return self.whole.get_image_features(image).pooler_output
    def encode_text(self, text, normalize=False):
        assert text.shape[1] == 256, "BiomedCLIP reads 256 tokens"
        return self.whole.get_text_features(text[:, :77]).pooler_output

def create_model_from_pretrained(model_name, pretrained=None, precision="fp32", device="cpu"):
    assert model_name.startswith("hf-hub:microsoft/BiomedCLIP")
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    return CLIP().train(), lambda i: processor(i, return_tensors="pt")["pixel_values"][0]

def get_tokenizer(model_name="", context_length=None):
    reader = AutoTokenizer.from_pretrained(FOLDER)
    def tokenizer(texts, context_length=None):
        how = dict(padding="max_length", truncation=True, return_tensors="pt")
        return reader(texts, max_length=context_length or 77, **how)["input_ids"]
    return tokenizer
'''

CLIP = '''
"""As OpenAI's clip: load and tokenize."""
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))
    def encode_image(self, image):
        assert image.shape[1:] == (3, 224, 224)
        return image.mean((2, 3)) + self.bias
    def encode_text(self, text):
        return text[:, :3].float() + 1

def load(name, device="cuda", jit=False, download_root=None):
    assert name == "ViT-B/32" and device == "cpu" and not jit
    return Model(), None

def tokenize(texts, context_length=77, truncate=False):
    rows = [[ord(c) for c in t[:context_length].ljust(context_length)] for t in texts]
    return torch.tensor(rows, dtype=torch.int)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with mymodels.py of the page, and both libraries."""
    page = (Path(__file__).parents[1] / "docs/models.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(class OpenClip.*?)```", page, re.S)
    (tmp_path / "mymodels.py").write_text(code, "utf-8")
    clip = save_clip(tmp_path / "clip_weights")
    (tmp_path / "open_clip.py").write_text(OPEN_CLIP.format(folder=str(clip)), "utf-8")
    (tmp_path / "clip.py").write_text(CLIP, "utf-8")
    weights = {"bias": torch.tensor([0.0, 0.5, 1.0])}
    torch.save(weights, tmp_path / "best_64_5e-05_original_22000_0.864.pt")
    for i in range(3):
        grey = np.random.default_rng(i).integers(0, 256, (50, 40), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(grey).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def test_biomedclip_scores_as_the_weights_that_it_is_made_of(folder: Path):
    out = folder / "p.csv"
    ended = start(
        folder / "log", "predict", "--model", "mymodels:biomedclip", "images", "--finding", "edema",
        "--prompts", "pair", "--out", out, "--cpu", cwd=folder,
    ).wait()  # fmt: skip
    assert ended.code == 0, ended.err
    lines = [line.split(",") for line in out.read_text("utf-8").splitlines()[1:]]
    hand = ByHand(folder / "clip_weights")
    for name, score in lines:
        want = hand.score(folder / name, ["edema"], ["no edema"])
        assert float(score) == pytest.approx(want, abs=1e-5)


def test_chexzero_reads_grey_padded_to_320_px(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    model = mmclip.load("mymodels:CheXzero", device="cpu")
    assert model.zeroshot_rule == "prompt_pair" and model.image_size == 224
    whole = np.full((300, 300), 200, np.uint8)
    whole[:150] = 100  # blank images are refused
    (found,) = model.encode_images(whole)
    want = (150 - 101.48761) / 83.43944 + np.array([0, 0.5, 1])
    np.testing.assert_allclose(found, want / np.linalg.norm(want), atol=1e-3)
    high = whole[:, :150]  # padded left and right with black
    (found,) = model.encode_images(high)
    want = (75 - 101.48761) / 83.43944 + np.array([0, 0.5, 1])
    np.testing.assert_allclose(found, want / np.linalg.norm(want), atol=5e-3)
    assert model.encode_texts(["edema"]).shape == (1, 3)
