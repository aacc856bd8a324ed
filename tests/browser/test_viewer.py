"""The viewer for adapter folders in a real JupyterLab: its numbers are Python's, and a hostile file is only a sentence."""

import json
import os
import struct
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import lora_nb as ln
from tests.models import fill, tiny_llama

pytestmark = [pytest.mark.browser, pytest.mark.slow]
HOSTILE = '<img src=x onerror="window.hacked = true">'
RTL = "محوّل"


def peft_made(folder, dtype=torch.float32):
    """PEFT's own file, with ranks and alphas of their own for some modules."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 5}
    )
    model = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_().div_(7)
    model.to(dtype).save_pretrained(folder)


def lora_nb_made(folder):
    model = tiny_llama()
    ln.attach(model, ln.LoraConfig(r=3, lora_alpha=9, target_modules="all-linear", use_rslora=True))
    fill(model)
    ln.save(model, folder)


@pytest.fixture
def show(lab):
    """Opens a file of the workspace, waits for the end of reading, and gives the document's element."""

    def view(path):
        lab.evaluate("[...jupyterapp.shell.widgets('main')].forEach((widget) => widget.close())")
        lab.wait_for_selector(".lora-viewer", state="detached")
        lab.evaluate("(path) => void jupyterapp.commands.execute('docmanager:open', { path })", path)
        document = lab.locator(".lora-viewer:visible")
        document.locator(".lora-json, [role=alert]").first.wait_for(timeout=30_000)
        return document

    return view


def numbers(document):
    document.get_by_text("Numbers as JSON").click()
    document.locator("pre", has_text="}").wait_for()
    return json.loads(document.locator("pre").inner_text())


def expected(folder):
    """Path → scale and singular values, by torch's SVD of ΔW itself."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    out = {}
    for key, A in tensors.items():
        if ".lora_A." not in key:
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = tensors[key.replace("lora_A", "lora_B")]
        special = [alpha for name, alpha in config["alpha_pattern"].items() if path.endswith(f".{name}")]
        alpha = special[0] if special else config["lora_alpha"]
        scale = alpha / (len(A) ** 0.5 if config["use_rslora"] else len(A))
        out[path] = scale, torch.linalg.svdvals(scale * B.double() @ A.double())[: len(A)]
    return out


@pytest.mark.parametrize("made", ["peft", "peft-bf16", "peft-fp16", "lora_nb"])
def test_numbers_are_those_of_python(show, workspace, made):
    folder = workspace / "numbers" / made
    kinds = {"peft-bf16": torch.bfloat16, "peft-fp16": torch.float16}
    lora_nb_made(folder) if made == "lora_nb" else peft_made(folder, kinds.get(made, torch.float32))
    from_config = numbers(show(f"numbers/{made}/adapter_config.json"))
    document = show(f"numbers/{made}/adapter_model.safetensors")
    shown, told = numbers(document), ln.inspect(folder)
    assert shown == from_config
    assert shown["parameters"] == told.parameters
    assert shown["base"] == told.base
    assert shown["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert shown["method"] == ("LoRA, rank-stabilised" if made == "lora_nb" else "LoRA")
    assert {m["path"]: (m["rank"], m["fanIn"], m["fanOut"]) for m in shown["modules"]} == told.modules
    wanted = expected(folder)
    assert {m["path"] for m in shown["modules"]} == wanted.keys()
    for module in shown["modules"]:
        scale, values = wanted[module["path"]]
        assert module["scale"] == pytest.approx(scale, rel=1e-12)
        assert module["singularValues"] == pytest.approx(values.tolist(), rel=1e-9)
        assert module["norm"] == pytest.approx(values.norm().item(), rel=1e-9)
    assert shown["warnings"] == []
    assert document.locator("td[tabindex]").count() == len(wanted)


def test_heat_map_and_spectrum_by_keyboard(show, workspace, lab):
    folder = workspace / "keys"
    peft_made(folder)
    document = show("keys/adapter_config.json")
    assert document.locator(".lora-facts").inner_text().splitlines()[:2] == ["method", "LoRA"]
    document.locator("td[tabindex='0']").focus()
    for key in ("ArrowDown", "ArrowUp", "ArrowRight", "Enter"):
        lab.keyboard.press(key)
    path = "model.layers.1.mlp.down_proj"
    assert document.locator("h3").inner_text() == f"Singular values of {path}"
    assert document.locator(".lora-spike").count() == 2
    norm = expected(folder)[path][1].norm().item()
    assert document.locator(".lora-said").first.inner_text() == f"mlp.down_proj, layer 1: {float(f'{norm:.4g}')}"


def write(folder, header, data=b"", config=None):
    """A safetensors file of any header."""
    folder.mkdir(parents=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": ["q"]} | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))


def tensor(*offsets, shape=(1, 1), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD = {
    "no-json": (b"{", b""),
    "a-list": ([], b""),
    "overlap": ({"a": tensor(0, 4), "b": tensor(0, 4)}, bytes(4)),
    "hole": ({"a": tensor(4, 8)}, bytes(8)),
    "tail": ({"a": tensor(0, 4)}, bytes(8)),
    "outside": ({"a": tensor(0, 400, shape=(100,))}, bytes(4)),
    "negative": ({"a": tensor(-4, 0)}, bytes(4)),
    "huge-shape": ({"a": tensor(0, 4, shape=(2**31, 2**31))}, bytes(4)),
    "fractions": ({"a": tensor(0, 4, shape=(0.5, 2))}, bytes(4)),
    "unknown-type": ({"a": tensor(0, 4, dtype="toString")}, bytes(4)),
    "no-entry": ({"a": 7}, b""),
}


def test_damaged_file_is_a_sentence(show, workspace):
    for case, (header, data) in BAD.items():
        write(workspace / "bad" / case, header, data)
        assert "damaged" in show(f"bad/{case}/adapter_model.safetensors").get_by_role("alert").inner_text(), case
    write(workspace / "claims", {})
    (workspace / "claims/adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**63))
    assert "claims a header of 9223372036854775808 bytes" in show("claims/adapter_model.safetensors").get_by_role("alert").inner_text()


def test_file_of_200_megabytes_is_refused_in_words(show, workspace):
    write(workspace / "large", {})
    with (workspace / "large/adapter_model.safetensors").open("r+b") as file:
        file.truncate(200_000_000)
    document = show("large/adapter_model.safetensors")
    assert "over 128 MiB they are not read" in document.locator(".lora-warnings").inner_text()
    assert "191 MiB" in document.locator(".lora-facts").inner_text()


def test_what_is_no_whole_adapter_of_this_kind_says_so(show, workspace):
    (workspace / "half").mkdir()
    (workspace / "half/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    assert "adapter_model.safetensors is not here" in show("half/adapter_config.json").get_by_role("alert").inner_text()
    (workspace / "half/adapter_config.json").write_text("[" * 100_000)
    assert "not valid JSON" in show("half/adapter_config.json").get_by_role("alert").inner_text()
    write(workspace / "prompt", {}, config={"peft_type": "PROMPT_TUNING"})
    assert "Not LoRA in PEFT's format" in show("prompt/adapter_config.json").locator(".lora-warnings").inner_text()


def test_not_a_number_is_said(show, workspace):
    header = {f"base_model.model.q.lora_{side}.weight": tensor(4 * i, 4 * i + 4) for i, side in enumerate("AB")}
    write(workspace / "nan", header, struct.pack("<2f", float("nan"), 1))
    shown = numbers(show("nan/adapter_config.json"))
    assert shown["warnings"] == ["q holds NaN or infinity."]
    assert shown["modules"][0]["norm"] is None


def test_names_stay_text(show, workspace, lab):
    for i, name in enumerate((HOSTILE, '"; rm', RTL, "x" * 5000)):
        header = {f"base_model.model.layers.0.{name}.lora_{side}.weight": tensor(4 * i, 4 * i + 4) for i, side in enumerate("AB")}
        config = {"base_model_name_or_path": name, "target_modules": [name], "alpha_pattern": {f"({name})+": 2}}
        write(workspace / f"names/{i}", header, struct.pack("<2f", 2, 5), config)
        document = show(f"names/{i}/adapter_model.safetensors")
        assert name in document.locator(".lora-facts").evaluate("e => e.textContent")
        assert document.locator("img").count() == 0
        assert numbers(document)["modules"][0]["norm"] == 30
        assert "with brackets or repeats" in document.locator(".lora-warnings").inner_text()
    assert lab.evaluate("window.hacked") is None


def test_no_barrier(lab, show, workspace, theme, axe):
    peft_made(workspace / "adapters/tone")
    document = show("adapters/tone/adapter_config.json")
    lab.screenshot(path=Path(os.environ.get("LORA_NB_SCREENSHOTS", workspace)) / "viewer.png")
    for summary in document.locator("summary").all():
        summary.click()
    for name in ("Light", "Dark"):
        theme(name)
        assert axe(".lora-viewer") == []
