"""Published DiTs: the authors' checkpoints and diffusers' folders, against diffusers' own class."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nanosd3.errors import InputError
from nanosd3.official.tensors import in_memory
from nanosd3.related import published_dit
from nanosd3.related.dit import DIT_CONFIGS, DiT, DiTConfig
from nanosd3.related.published_dit import detect_dit, open_dit, own_names

# 24 wide heads, three channels in, no size equal to another
CONFIG = DiTConfig(3, 48, 2, 2, 10, 3, 7, True, "adaln_zero", 0.1)
INPUTS = (
    torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0)).double(),
    torch.tensor([0, 37, 500, 999]),  # steps whose thousandths are exact enough in float32
    torch.tensor([0, 6, 3, 7]),  # 7 is no class
)


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.2 * noise / max(1, parameter.shape[-1]) ** 0.5
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    """diffusers' class, with what it computes otherwise put right, and the embedders of all
    blocks alike, as they are in files."""
    return put_right(
        num_attention_heads=2, attention_head_dim=24, in_channels=3, out_channels=6,
        num_layers=3, sample_size=10, num_embeds_ada_norm=7,
    )  # fmt: skip


def put_right(**sizes: int) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = shaken(diffusers.DiTTransformer2DModel(patch_size=2, norm_eps=1e-6, **sizes))
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("diffusers") / "DiT"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("authors") / "DiT.pt"
    torch.save(shaken(DiT(CONFIG)).state_dict(), path)
    return path


def answers(model: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> tuple:
    z, n, y = INPUTS
    with torch.no_grad():
        expected = theirs.to(dtype)(z.to(dtype), timestep=n, class_labels=y).sample
        return model(z.to(dtype), n.to(dtype) / 1000, y), expected


# --- diffusers' folders -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_folder_against_diffusers(theirs, folder, dtype, tolerance):
    model = open_dit(folder, dtype=dtype)
    assert replace(model.config, embedding_std=CONFIG.embedding_std) == CONFIG
    ours, expected = answers(model, theirs, dtype)
    assert ours.dtype == dtype and ours.shape == (4, 6, 10, 10)
    assert expected.std() > 0.1  # neither half is near zero
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_real_size_against_diffusers(tmp_path):
    """DiT-S/2 with latents off centre: beside float64, no less exact than theirs."""
    theirs = put_right(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8,
        num_layers=12, sample_size=32, num_embeds_ada_norm=1000,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = open_dit(tmp_path)
    assert replace(ours.config, embedding_std=0.02) == DIT_CONFIGS["DiT-S/2"]
    z = 3 + 5 * torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    n, y = torch.tensor([37]), torch.tensor([999])
    outputs = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            x = z.to(dtype)
            outputs.append(ours.to(dtype)(x, n.to(dtype) / 1000, y).double())
            outputs.append(theirs.to(dtype)(x, timestep=n, class_labels=y).sample.double())
    single, their_single, double, truth = outputs
    assert truth.std() > 0.1
    torch.testing.assert_close(double, truth, atol=1e-12, rtol=1e-12)
    assert (single - truth).abs().max() <= 2 * (their_single - truth).abs().max()
    torch.testing.assert_close(single, their_single, atol=1e-5, rtol=1e-5)


def test_dropped_labels_against_diffusers(theirs, folder):
    """Their own way of leaving labels out gives our null class."""
    model = open_dit(folder, dtype=torch.float64)
    theirs.double()
    y = torch.tensor([1, 2, 3, 4])
    embedder = theirs.transformer_blocks[0].norm1.emb.class_embedder
    dropped = embedder(y, force_drop_ids=torch.tensor([0, 1, 0, 1]))
    table = model.y_embedder["embedding_table"]
    labels = torch.tensor([1, CONFIG.null, 3, CONFIG.null])
    torch.testing.assert_close(table(labels), dropped, atol=0, rtol=0)


@pytest.mark.parametrize("form", ["bin", "shards", "pipeline"])
def test_other_forms_of_a_folder(theirs, folder, tmp_path, form):
    place = tmp_path / "transformer" if form == "pipeline" else tmp_path
    options = {"bin": {"safe_serialization": False}, "shards": {"max_shard_size": "30KB"}}
    theirs.float().save_pretrained(place, **options.get(form, {}))
    expected, found = open_dit(folder).state_dict(), open_dit(tmp_path).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_what_diffusers_computes_otherwise(theirs, folder):
    """Its frequencies and one epsilon; without these differences the test above is exact."""
    model = open_dit(folder, dtype=torch.float64)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    try:
        ours, expected = answers(model, theirs, torch.float64)
    finally:
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert (ours - expected).abs()[0].max() < 1e-12  # at time 0 all frequencies are alike
    assert (ours - expected).abs()[1:].max() > 1e-3


def test_position_table(theirs, folder):
    torch.testing.assert_close(open_dit(folder).pos_embed, theirs.pos_embed.pos_embed.float())


# --- the authors' checkpoints ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint(checkpoint, tmp_path, zipped):
    state = torch.load(checkpoint)
    path = tmp_path / "DiT.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    before = path.read_bytes()
    model = open_dit(path, CONFIG)
    original = DiT(CONFIG)
    original.load_state_dict(state)
    z, n, y = INPUTS
    torch.testing.assert_close(
        model(z.float(), n / 1000, y), original(z.float(), n / 1000, y), atol=0, rtol=0
    )
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["DiT.pt"]


@pytest.mark.parametrize("name", DIT_CONFIGS)
def test_published_sizes_are_recognised(name):
    config = DIT_CONFIGS[name]
    for size in (config.latent_size, 2 * config.latent_size):
        with torch.device("meta"):
            model = DiT(replace(config, latent_size=size))
        file = Path("x.pt")
        state = {key: in_memory(key, tensor, file) for key, tensor in model.state_dict().items()}
        if name.startswith("DiT-"):
            assert detect_dit(state, own_names, None, file) == replace(config, latent_size=size)
        else:
            with pytest.raises(InputError, match="no published DiT; give its config"):
                detect_dit(state, own_names, None, file)


def test_learned_variance_is_recognised():
    with torch.device("meta"):
        model = DiT(replace(DIT_CONFIGS["DiT-S/4"], learned_variance=False))
    file = Path("x.pt")
    state = {key: in_memory(key, tensor, file) for key, tensor in model.state_dict().items()}
    assert detect_dit(state, own_names, None, file) == model.config


def test_dtype(checkpoint):
    model = open_dit(checkpoint, CONFIG, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- bad input ------------------------------------------------------------------------------------


def change(checkpoint: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy with tensors replaced, or left out if None."""
    state = torch.load(checkpoint) | {key.replace("__", "."): v for key, v in changes.items()}
    path = tmp_path / "changed.pt"
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


def refusal(path: Path, config: DiTConfig | None = CONFIG) -> str:
    with pytest.raises(InputError) as caught:
        open_dit(path, config)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line
    return line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__1__attn__qkv__weight": None}, "blocks.1.attn.qkv.weight is missing"),
        ({"pos_embed": None}, "pos_embed is missing"),
        ({"blocks__3__attn__qkv__weight": torch.zeros(1)}, "blocks.3.attn.qkv.weight is unknown"),
        ({"blocks__1__mlp__fc1__bias": torch.zeros(191)},
         "blocks.1.mlp.fc1.bias has shape (191,), not (192,)"),
        ({"blocks__1__mlp__fc1__bias": torch.zeros(())}, "has shape (), not (192,)"),
        ({"blocks__1__mlp__fc1__bias": torch.zeros(192, dtype=torch.int64)},
         "blocks.1.mlp.fc1.bias is torch.int64"),
        ({"blocks__1__mlp__fc1__bias": torch.full((192,), float("nan"))},
         "tensor blocks.1.mlp.fc1.bias holds NaN or infinity"),
        ({"pos_embed": torch.zeros(1, 25, 48)}, "pos_embed is not DiT's table"),
    ],
)  # fmt: skip
def test_bad_checkpoints(checkpoint, tmp_path, changes, message):
    assert message in refusal(change(checkpoint, tmp_path, **changes))


def test_a_table_turned_round(checkpoint, tmp_path):
    table = torch.load(checkpoint)["pos_embed"]
    turned = table.view(5, 5, 48).transpose(0, 1).reshape(1, 25, 48)
    assert "not DiT's table" in refusal(change(checkpoint, tmp_path, pos_embed=turned))
    open_dit(change(checkpoint, tmp_path, pos_embed=table.bfloat16()), CONFIG)


def test_another_size(checkpoint):
    assert "3 blocks of width 48 are no published DiT" in refusal(checkpoint, None)
    line = refusal(checkpoint, DIT_CONFIGS["DiT-S/8"])
    assert "pos_embed has shape (1, 25, 48), not (1, 16, 384)" in line and "more" in line
    assert "blocks.2." in refusal(checkpoint, replace(CONFIG, depth=2))
    assert "adaLN" in refusal(checkpoint, replace(CONFIG, block="adaln"))


@pytest.mark.parametrize("key", ["x_embedder.proj.weight", "y_embedder.embedding_table.weight",
                                 "final_layer.linear.weight", "pos_embed"])  # fmt: skip
def test_sizes_cannot_be_read(checkpoint, tmp_path, key):
    config = replace(DIT_CONFIGS["DiT-S/8"], latent_size=16)
    with torch.device("meta"):
        full = DiT(config)
    state = {k: torch.zeros(1).expand(v.shape) for k, v in full.state_dict().items()}
    path = tmp_path / "x.pt"
    for wrong, message in ((None, "is missing"), (torch.zeros(3), "has shape (3,)")):
        torch.save({k: v for k, v in (state | {key: wrong}).items() if v is not None}, path)
        line = refusal(path, None)
        assert key in line and message in line and "DiT" in line


class Code:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_is_not_run(checkpoint, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "code.pt"
    torch.save(Code(marker), path)
    assert "could run code" in refusal(path)
    torch.save(torch.load(checkpoint) | {"args": Code(marker)}, path)
    assert "could run code" in refusal(path)
    assert not marker.exists()


def test_no_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "no.pt")
    assert "config.json: is missing" in refusal(tmp_path, None)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no weights" in refusal(tmp_path, None)


def edited(folder: Path, tmp_path: Path, **settings: object) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_type": "ada_norm"}, "norm_type is 'ada_norm'"),
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel'"),
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu'"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine is True"),
        ({"num_attention_heads": 5}, "3 blocks of width 48 with 5 heads are no published DiT"),
        ({"num_attention_heads": "two"}, "num_attention_heads should be a number"),
        ({"sample_size": 10**9}, "sample_size is 1000000000, expected up to 1024 in 2s"),
        ({"sample_size": 9}, "sample_size is 9, expected up to 1024 in 2s"),
    ],
)
def test_bad_settings(folder, tmp_path, settings, message):
    assert message in refusal(edited(folder, tmp_path, **settings), None)


def test_a_config_that_is_not_the_folders(folder):
    open_dit(folder, CONFIG)
    for wrong in (replace(CONFIG, heads=4), replace(CONFIG, latent_size=12)):
        assert "2 heads and latents of 10 are not the config's" in refusal(folder, wrong)


@pytest.mark.parametrize("name", published_dit.IN_EVERY_BLOCK.values())
def test_embedders_that_differ(theirs, tmp_path, name):
    theirs.float()
    parameter = theirs.get_parameter(f"transformer_blocks.2.{name}.weight")
    parameter.data[0, 0] += 1
    try:
        theirs.save_pretrained(tmp_path)
    finally:
        parameter.data[0, 0] -= 1
    line = refusal(tmp_path, None)
    assert f"blocks.2.{name}.weight is not transformer_blocks.0.{name}.weight" in line


def test_a_folder_without_keys(theirs, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    file = edited(folder, tmp_path) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.1.attn1.to_k.weight"]
    save_file(state, file)
    assert "transformer_blocks.1.attn1.to_k.weight is missing" in refusal(tmp_path, None)
