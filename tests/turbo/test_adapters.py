"""turbo/adapters.py: products are those of peft, and what is more than a product is refused."""

import json
import shutil

import lora_folders
import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo.adapters import check_same_base, read_adapter

KINDS = {
    "plain": {},
    "rslora": dict(r=6, lora_alpha=3, use_rslora=True),
    "patterns": dict(
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        alpha_pattern={"v_proj": 1, r"layers\.0\..*down_proj": 24},
        use_rslora=True,
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return lora_folders.save_base(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def plain(base):
    return lora_folders.save_adapter(base.parent / "plain", base, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_peft(base, tmp_path, kind):
    folder = lora_folders.save_adapter(tmp_path / "a", base, 1, **KINDS[kind])
    adapter = read_adapter(str(folder))
    wanted = lora_folders.deltas(lora_folders.with_adapters(base, folder))
    assert adapter.factors.keys() == wanted.keys() and len(wanted) == 6
    for name, (a, b) in adapter.factors.items():
        torch.testing.assert_close(adapter.scales[name] * b @ a, wanted[name])
    if kind == "patterns":
        assert len({a.shape[0] for a, _ in adapter.factors.values()}) == 3
        assert len(set(adapter.scales.values())) > 3
    assert (
        adapter.base == str(base) and adapter.rank == {"plain": 4, "rslora": 6, "patterns": 7}[kind]
    )


def changed(folder, tmp_path, tensors=None, **config):
    """A copy of an adapter with other settings or other tensors."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    told = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(told | config))
    if tensors:
        held = load_file(copy / "adapter_model.safetensors")
        save_file(tensors(held), copy / "adapter_model.safetensors")
    return str(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(peft_type="IA3"), "is an adapter of type 'IA3': only LORA can be merged"),
        (dict(use_dora=True), "has use_dora: true, which is more than a product"),
        (dict(modules_to_save=["lm_head"]), 'has modules_to_save: ["lm_head"]'),
        (dict(bias="all"), "has trained biases, bias: 'all'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights: 'pissa', which changes the base"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_other_adapters_are_refused_by_name(plain, tmp_path, config, message):
    with pytest.raises(ValueError) as caught:
        read_adapter(changed(plain, tmp_path, **config))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: t | {Q: torch.full_like(t[Q], torch.nan)}, "has a NaN or an infinity"),
        (lambda t: t | {Q: t[Q][:2].clone()}, "do not fit each other"),
        (lambda t: {k: v for k, v in t.items() if k != Q}, "do not fit each other"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "only factors of"),
        (lambda t: t | {Q: torch.ones(4, 32, 1, 1)}, "(4, 32, 1, 1): only factors of linear"),
    ],
    ids=["nan", "rank", "half", "matrix", "convolution"],
)
def test_odd_tensors_are_refused(plain, tmp_path, tensors, message):
    with pytest.raises(ValueError) as caught:
        read_adapter(changed(plain, tmp_path, tensors))
    assert message in str(caught.value)


def test_folders_that_are_none(plain, tmp_path):
    with pytest.raises(ValueError, match="is no folder: give a peft adapter, or a run"):
        read_adapter(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"has neither adapter_config.json nor a run's checkp"):
        read_adapter(str(tmp_path))
    pickled = tmp_path / "pickled"
    shutil.copytree(plain, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickles are not read"):
        read_adapter(str(pickled))
    (pickled / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        read_adapter(str(pickled))


def test_adapters_of_other_models(plain, tmp_path):
    one = read_adapter(str(plain))
    other = read_adapter(changed(plain, tmp_path, base_model_name_or_path="owner/base"))
    with pytest.raises(ValueError, match=r"differ in the base, .*'owner/base': add --force"):
        check_same_base([one, other], force=False)
    check_same_base([one, other], force=True)
    small = {Q: torch.ones(4, 16)}
    other = read_adapter(changed(plain, tmp_path / "shape", lambda t: t | small))
    with pytest.raises(ValueError, match=r"is \(32, 16\), and \(32, 32\) in one before"):
        check_same_base([one, other], force=True)
