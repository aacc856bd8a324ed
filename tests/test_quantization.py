"""Bases in few bits: which layers, what is left alone, what is said, what is read and written, and adapters over them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lora_nb as ln
from lora_nb.attach import weights
from lora_nb.bases import EMBEDDED
from lora_nb.errors import AdapterError, BaseModelError, ConfigError, QuantizationError
from lora_nb.layers.linear4bit import Linear4bit, dense_weight
from lora_nb.layers.nf4 import dequantize, quantize
from lora_nb.quantization import size
from tests.models import fill, tiny_gpt2, tiny_llama, token_ids

ALL = {"r": 4, "lora_alpha": 12.0, "target_modules": "all-linear"}
KINDS = ("nf4", "fp4", "bnb-nf4", "bnb-fp4", "bnb-int8")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=6144
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED["tiny"]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def wide_llama() -> nn.Module:
    """Rows of 64 and 128, which bitsandbytes can do on a CPU."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=61
    )
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


class TestQuantize:
    def test_linear_layers_but_the_head_and_nothing_else(self) -> None:
        model = tiny_llama()
        before = copy.deepcopy(model)
        report = ln.quantize(model, ln.QuantConfig(quant_type="nf4"))
        quantized = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        assert quantized == {n for n, m in before.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"} == set(report.modules)
        for name, p in before.named_parameters():
            if name.removesuffix(".weight") not in quantized:
                assert torch.equal(model.get_parameter(name), p)
        assert report.skipped == {"lm_head": "it is the output head"}
        assert report.before == sum(p.numel() * 4 for p in before.parameters()) + sum(b.numel() * 4 for b in before.buffers())
        assert report.after < report.before

    def test_the_output_is_that_of_the_rounded_weights(self) -> None:
        model, twin = tiny_llama(), tiny_llama()
        report = ln.quantize(model)
        for name in report.modules:
            w = twin.get_submodule(name).weight
            w.data = dequantize(quantize(w, double_quant=True))
        assert torch.equal(logits(model), logits(twin))

    def test_report(self) -> None:
        report = ln.quantize(tiny_llama(), ln.QuantConfig(double_quant=False, compute_dtype=torch.bfloat16))
        module = report.modules["model.layers.0.self_attn.k_proj"]
        assert module.shape == (16, 32)
        assert module.bits == 4.5
        assert module.error == pytest.approx(0.092, abs=0.01)
        for text in (repr(report), report._repr_html_()):
            assert "bfloat16" in text
            assert "21 linear layers in nf4" in text
            assert "lm_head is left as it is: it is the output head" in text

    def test_conv1d_becomes_a_linear_layer(self) -> None:
        model, twin = tiny_gpt2(), tiny_gpt2()
        report = ln.quantize(model)
        assert len(report.modules) == 12
        assert isinstance(model.transformer.h[0].attn.c_attn, Linear4bit)
        for name in report.modules:
            w = twin.get_submodule(name).weight
            w.data = dequantize(quantize(w.T.contiguous(), double_quant=True)).T.contiguous()
        torch.testing.assert_close(logits(model), logits(twin))

    @pytest.mark.parametrize(
        ("settings", "left"),
        [
            ({"skip_modules": ["mlp"]}, 9),
            ({"skip_modules": ["q_proj", "v_proj"]}, 6),
            ({"skip_modules": r".*layers\.0\..*"}, 7),
            ({"skip_head": False}, 0),
        ],
    )
    def test_what_is_skipped(self, settings, left: int) -> None:
        report = ln.quantize(tiny_llama(), ln.QuantConfig(**settings))
        assert len(report.skipped) == left + (settings.get("skip_head", True))
        assert len(report.modules) == 22 - len(report.skipped)

    def test_a_tied_head_stays(self) -> None:
        model = tiny_llama(tied=True)
        report = ln.quantize(model, ln.QuantConfig(skip_head=False))
        assert report.skipped == {"lm_head": "it shares its weight with another layer"}
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_compute_dtype_by_default(self) -> None:
        assert ln.quantize(tiny_llama()).compute_dtype == torch.float32
        assert ln.quantize(tiny_llama().bfloat16()).compute_dtype == torch.bfloat16

    @pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8"])
    def test_layers_of_bitsandbytes(self, kind: str) -> None:
        model, twin = wide_llama(), wide_llama()
        report = ln.quantize(model, ln.QuantConfig(quant_type=kind))
        assert type(model.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
        for name in report.modules:
            twin.get_submodule(name).weight.data = dense_weight(model.get_submodule(name))
        assert (logits(model) - logits(twin)).norm() / logits(twin).norm() < (1e-5 if kind == "bnb-nf4" else 0.03)  # int8 rounds inputs

    def test_refusals(self) -> None:
        model = wide_llama()
        with pytest.raises(QuantizationError, match=r"skip_modules=.*Did you mean 'q_proj'"):
            ln.quantize(model, ln.QuantConfig(skip_modules=["q_prj"]))
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
        for kind in ("nf4", "bnb-nf4", "bnb-int8"):
            with pytest.raises(QuantizationError, match="NaN or infinity"):
                ln.quantize(copy.deepcopy(model), ln.QuantConfig(quant_type=kind))
        with pytest.raises(QuantizationError, match="row of 32 is no multiple of 64"):
            ln.quantize(tiny_llama(), ln.QuantConfig(quant_type="bnb-nf4"))
        with pytest.raises(QuantizationError, match="no linear layer"):
            ln.quantize(nn.Sequential(nn.LayerNorm(4)))
        twice = wide_llama()
        ln.quantize(twice)
        with pytest.raises(QuantizationError, match="no linear layer left"):
            ln.quantize(twice)
        adapted = wide_llama()
        ln.attach(adapted, ln.LoraConfig(**ALL), "tone")
        with pytest.raises(QuantizationError, match=r"has adapters \(tone\)"):
            ln.quantize(adapted)


class TestLoad:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_as_quantizing_afterwards(self, saved: Path, kind: str) -> None:
        model, _ = ln.load(saved, quant=kind, device="cpu")
        other, _ = ln.load(saved, device="cpu")
        report = ln.quantize(other, ln.QuantConfig(quant_type=kind))
        assert len(report.modules) == 14
        state = other.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items() if isinstance(t, torch.Tensor))
        assert not model.training

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_fingerprint_stays_that_of_the_base(self, saved: Path, kind: str, tmp_path: Path) -> None:
        base, tokenizer = ln.load(saved, device="cpu")
        model, _ = ln.load(saved, quant=kind, device="cpu")
        assert ln.fingerprint(model) == ln.fingerprint(base)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert ln.fingerprint(ln.load(tmp_path, device="cpu")[0]) == ln.fingerprint(base)

    @pytest.mark.parametrize("kind", KINDS[:4])
    def test_what_is_saved_is_read_by_us_and_by_transformers(self, saved: Path, kind: str, tmp_path: Path) -> None:
        model, tokenizer = ln.load(saved, quant=kind, device="cpu")
        expected = logits(model)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        again = ln.load(tmp_path, device="cpu")[0]
        assert isinstance(again.model.layers[0].mlp.up_proj, Linear4bit)
        torch.testing.assert_close(logits(again), expected)
        theirs = ln.load(tmp_path, quant=f"bnb-{kind.removeprefix('bnb-')}", device="cpu")[0]
        assert type(theirs.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
        torch.testing.assert_close(logits(theirs), expected)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
        torch.testing.assert_close(logits(loaded), expected)

    def test_a_checkpoint_that_transformers_quantized(self, saved: Path, tmp_path: Path) -> None:
        from transformers import BitsAndBytesConfig

        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        theirs = AutoModelForCausalLM.from_pretrained(saved, quantization_config=settings, dtype=torch.float32)
        theirs.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path)
        ours = ln.load(tmp_path, device="cpu")[0]
        torch.testing.assert_close(logits(ours), logits(theirs))

    def test_settings(self, saved: Path) -> None:
        config = ln.QuantConfig(block_size=128, double_quant=False, skip_modules=["v_proj"], compute_dtype=torch.bfloat16)
        model, _ = ln.load(saved, quant=config, dtype=torch.bfloat16, device="cpu")
        layer = model.model.layers[0].self_attn.q_proj
        assert (layer.quantized.block_size, layer.quantized.nested, layer.compute_dtype) == (128, False, torch.bfloat16)
        assert type(model.model.layers[0].self_attn.v_proj) is nn.Linear
        assert model.model.norm.weight.dtype == torch.bfloat16

    def test_refusals(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="quant_type"):
            ln.load(folder, quant="nf3")
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.mlp.up_proj.weight"
        save_file(tensors | {name: tensors[name] * float("nan")}, file, {"format": "pt"})
        with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
            ln.load(folder, quant="nf4", device="cpu")
        save_file(tensors | {name: tensors[name][:-1].clone()}, file, {"format": "pt"})
        with pytest.raises(QuantizationError, match="does not fit"):
            ln.load(folder, quant="nf4", device="cpu")
        save_file({key: t for key, t in tensors.items() if key != name}, file, {"format": "pt"})
        with pytest.raises(BaseModelError, match="lacks 1 weights"):
            ln.load(folder, quant="nf4", device="cpu")

    def test_damaged_checkpoints_of_four_bits(self, saved: Path, tmp_path: Path) -> None:
        model, tokenizer = ln.load(saved, quant="nf4", device="cpu")
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.mlp.up_proj.weight"
        for key, change, words in [
            (name, lambda t: t[:-1].clone(), "packed is"),
            (f"{name}.nested_absmax", lambda t: t * float("nan"), "NaN or infinity"),
            (f"{name}.quant_map", lambda t: t * 0.5, "not the table"),
        ]:
            save_file(tensors | {key: change(tensors[key])}, file, {"format": "pt"})
            with pytest.raises(QuantizationError, match=rf"up_proj.*{words}"):
                ln.load(tmp_path, device="cpu")
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(QuantizationError, match="'fp4' was asked for"):
            ln.load(tmp_path, quant="fp4", device="cpu")
        config = tmp_path / "config.json"
        said = json.loads(config.read_text())
        said["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        config.write_text(json.dumps(said))
        with pytest.raises(BaseModelError, match="quantized already, by gptq"):
            ln.load(tmp_path, quant="nf4", device="cpu")


SETTINGS = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.1},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
}


class TestAdapters:
    """Each setting of LoRA over a base in few bits does what it does over the dense base of the same values."""

    @pytest.mark.parametrize("kind", ["nf4", "bnb-nf4"])
    @pytest.mark.parametrize("name", list(SETTINGS))
    def test_as_over_the_dense_weights(self, name: str, kind: str) -> None:
        config = ln.LoraConfig(**ALL | SETTINGS[name])
        model, twin = wide_llama(), wide_llama()
        for layer in ln.quantize(model, ln.QuantConfig(quant_type=kind)).modules:
            twin.get_submodule(layer).weight.data = dense_weight(model.get_submodule(layer))
        results = []
        for m in (model, twin):
            torch.manual_seed(3)
            report = ln.attach(m, config)
            if name not in {"pissa", "olora"}:
                fill(m)
            torch.manual_seed(4)
            m.train()
            m(input_ids=token_ids(), labels=token_ids()).loss.backward()
            m.eval()
            grads = {key: p.grad for key, p in ln.parameters(m).items()}
            results.append((report.trainable, logits(m), grads))
        (count, out, grads), (expected_count, expected, expected_grads) = results
        assert count == expected_count
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert grads.keys() == expected_grads.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[key], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", ["nf4", "bnb-nf4"])
    def test_detaching_leaves_the_base_as_it_was(self, kind: str) -> None:
        model = wide_llama()
        ln.quantize(model, ln.QuantConfig(quant_type=kind))
        state, expected = {k: t.clone() for k, t in model.state_dict().items()}, logits(model)
        ln.attach(model, ln.LoraConfig(**ALL))
        fill(model)
        assert not torch.equal(logits(model), expected)
        assert {k for k in model.state_dict() if ".adapters." not in k} == state.keys()
        ln.detach(model)
        assert torch.equal(logits(model), expected)
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())

    @pytest.mark.parametrize("kind", ["nf4", "bnb-nf4", "bnb-int8"])
    def test_size_is_that_of_the_base_and_the_adapters(self, kind: str) -> None:
        model = wide_llama()
        alone = ln.quantize(model, ln.QuantConfig(quant_type=kind)).after
        ln.attach(model, ln.LoraConfig(**ALL))
        added = sum(p.numel() * p.element_size() for p in ln.parameters(model).values())
        assert size(model) == alone + added
        logits(model)  # after which bitsandbytes keeps its scales in another place
        assert size(model) == alone + added

    def test_an_adapter_goes_from_a_quantized_base_to_the_plain_one(self, saved: Path, tmp_path: Path) -> None:
        model, _ = ln.load(saved, quant="nf4", device="cpu")
        ln.attach(model, ln.LoraConfig(**ALL))
        fill(model)
        ln.save(model, tmp_path / "tone")
        plain, _ = ln.load(saved, device="cpu")
        ln.load_adapter(plain, tmp_path / "tone")  # strict: the same base
        other, _ = ln.load(saved, quant="fp4", device="cpu")
        ln.load_adapter(other, tmp_path / "tone")
        for m in (plain, other):
            for path, part in weights(m, "default").items():
                assert torch.equal(part.lora_A, weights(model, "default")[path].lora_A)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_training_lowers_the_loss_and_leaves_the_base_alone(self, dtype: torch.dtype) -> None:
        model, tokenizer = ln.load("tiny", quant="nf4", dtype=dtype, device="cpu")
        before = {k: t.clone() for k, t in model.state_dict().items()}
        ln.attach(model, ln.LoraConfig(**ALL))
        config = ln.TrainConfig(max_steps=6, batch_size=4, seq_len=64, learning_rate=3e-3)
        run = ln.train(model, tokenizer, ln.dataset([("Could you", " please tell me the way to the station?")] * 16), config)
        assert run.losses[-1] < run.losses[0]
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items() if k in before)


class TestMerging:
    @staticmethod
    def adapted(kind: str = "nf4", size: float = 0.1, **settings) -> nn.Module:
        model = wide_llama()
        ln.quantize(model, ln.QuantConfig(quant_type=kind))
        ln.attach(model, ln.LoraConfig(**ALL, **settings))
        fill(model)
        with torch.no_grad():
            for part in weights(model, "default").values():
                part.lora_B.mul_(size / 0.1)
        return model

    @pytest.mark.parametrize("kind", ["nf4", "fp4", "bnb-nf4", "bnb-int8"])
    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
    def test_dequantized_keeps_the_output_and_comes_back(self, kind: str, settings) -> None:
        model = self.adapted(kind, **settings)
        state, expected = {k: t.clone() for k, t in model.state_dict().items()}, logits(model)
        report = ln.merge(model)
        assert report.target == "dequantized"
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
        assert min(report.survived.values()) == pytest.approx(1, abs=1e-4)
        if kind == "bnb-int8":  # its own products round the input to 8 bits
            assert (logits(model) - expected).norm() / expected.norm() < 0.05
        else:
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
            assert max(report.output_change.values()) < 1e-5
        ln.unmerge(model)
        assert torch.equal(logits(model), expected)
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())

    @pytest.mark.parametrize("kind", ["nf4", "bnb-nf4", "bnb-int8"])
    def test_a_base_in_16_bits_stays_in_16_bits(self, kind: str) -> None:
        model = wide_llama().bfloat16()
        ln.quantize(model, ln.QuantConfig(quant_type=kind))
        ln.attach(model, ln.LoraConfig(**ALL))
        fill(model)
        expected = logits(model)
        ln.merge(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert (logits(model) - expected).norm() / expected.norm() < 0.05

    @pytest.mark.parametrize("kind", ["nf4", "bnb-nf4"])
    def test_requantized_loses_a_small_update_and_says_so(self, kind: str) -> None:
        model = self.adapted(kind, size=0.001)
        expected = logits(model)
        with pytest.warns(UserWarning, match="Less than half of the update is left in 21 of 21 modules"):
            report = ln.merge(model, into="requantized")
        assert report.target == "requantized"
        assert max(report.survived.values()) < 0.5
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(layer, Linear4bit) == (kind == "nf4")
        assert "requantized" in repr(report)
        ln.unmerge(model)
        assert torch.equal(logits(model), expected)

    def test_requantized_keeps_a_large_one_without_a_warning(self) -> None:
        model = self.adapted(size=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = ln.merge(model, into="requantized")
        assert min(report.survived.values()) > 0.9
        assert 0.02 < max(report.output_change.values()) < 0.5

    def test_original(self) -> None:
        model, base = self.adapted(), wide_llama()
        update = {path: part.delta() for path, part in weights(model, "default").items()}
        report = ln.merge(model, into="original", original=base)
        assert report.target == "original"
        for path, delta in update.items():
            torch.testing.assert_close(model.get_submodule(path).weight, base.get_submodule(path).weight + delta)
        assert min(report.output_change.values()) > 1e-3  # the rounding that was learnt around is gone
        with pytest.raises(AdapterError, match="needs both"):
            ln.merge(self.adapted(), into="original")

    def test_original_of_a_layer_that_stores_its_weight_transposed(self) -> None:
        model, base = tiny_gpt2(), tiny_gpt2()
        ln.quantize(model)
        ln.attach(model, ln.LoraConfig(**ALL))
        fill(model)
        update = {path: part.delta() for path, part in weights(model, "default").items()}
        ln.merge(model, into="original", original=base)
        for path, delta in update.items():
            torch.testing.assert_close(model.get_submodule(path).weight, base.get_submodule(path).weight + delta.T)

    @pytest.mark.parametrize("make", [wide_llama, tiny_gpt2], ids=["llama", "gpt2"])
    def test_what_was_merged_into_dense_weights_is_read_as_it_was_saved(self, make, tmp_path: Path) -> None:
        """Neither rounded to four bits again, as the config would have it, nor transposed, as a quantized Conv1D is."""
        model = make()
        ln.quantize(model)
        noted = model.config.quantization_config
        ln.attach(model, ln.LoraConfig(**ALL))
        fill(model)
        expected = logits(model)
        report = ln.merge(model)
        assert min(report.survived.values()) == pytest.approx(1, abs=1e-4)
        model.save_pretrained(tmp_path)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert {type(m) for m in plain.modules()} == {type(m) for m in make().modules()}
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
        ln.unmerge(model)
        assert model.config.quantization_config == noted
        assert torch.equal(logits(model), expected)

    def test_layers_that_stay_in_four_bits_are_told_from_those_merged_into(self, tmp_path: Path) -> None:
        model = wide_llama()
        ln.quantize(model)
        ln.attach(model, ln.LoraConfig(r=4, lora_alpha=12.0, target_modules=["q_proj"]))
        fill(model)
        expected = logits(model)
        ln.merge(model)
        said = model.config.quantization_config["llm_int8_skip_modules"]
        assert [f"model.layers.{i}.self_attn.q_proj" in said for i in range(3)] == [True] * 3
        assert "lm_head" in said
        assert "model.layers.0.self_attn.k_proj" not in said
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(EMBEDDED["tiny"]).save_pretrained(tmp_path)
        read, _ = ln.load(tmp_path, device="cpu")
        assert type(read.model.layers[0].self_attn.q_proj) is nn.Linear
        assert isinstance(read.model.layers[0].self_attn.k_proj, Linear4bit)
        torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-4)
        ln.unmerge(model)
        assert "model.layers.0.self_attn.q_proj" not in model.config.quantization_config["llm_int8_skip_modules"]

    # ‖Δ‖/‖W‖ → share of it that is left after rounding to NF4 again: measured with bitsandbytes on Gaussian weights, 1024².
    @pytest.mark.parametrize(("share", "left"), [(0.3, 0.994), (0.1, 0.837), (0.03, 0.040), (0.01, 0.016)])
    def test_how_much_is_left_by_the_size_of_the_update(self, share: float, left: float) -> None:
        layer = Linear4bit(1024, 1024, bias=False)
        w = torch.randn(1024, 1024)
        layer.hold(quantize(w))
        model = nn.Sequential(layer)
        ln.attach(model, ln.LoraConfig(r=16, lora_alpha=4.0, target_modules=["0"]))
        part = weights(model, "default")["0"]
        with torch.no_grad():
            part.lora_A.normal_()
            part.lora_B.normal_()
            part.lora_B.mul_(share * w.norm() / part.delta().norm())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = ln.merge(model, into="requantized", sample=torch.randn(2, 1024))
        assert report.survived["0"] == pytest.approx(left, abs=0.01)


def test_a_quantized_layer_cannot_be_saved_whole() -> None:
    model, _ = ln.load("tiny", quant="nf4")
    with pytest.raises(ln.errors.TargetError, match=r"q_proj'.*few bits.*skip_modules"):
        ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj"], modules_to_save=["q_proj"]))
    assert not ln.attach(model, ln.LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj"], modules_to_save=["norm"])).notes
