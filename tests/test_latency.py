"""What is timed and counted, in which state, and what is refused."""

import pytest
import torch
from torch import nn

import lora_nb.latency
from lora_nb.configs import LoraConfig
from lora_nb.errors import LatencyError
from lora_nb.latency import LatencySweep, LatencyTable, measure_latency, sweep_latency
from lora_nb.timing import Times
from lora_nb.variants import variants
from tests.models import tiny_bert, tiny_gpt2, tiny_llama

CONFIG = LoraConfig(r=4, lora_alpha=6)
LAYERS = 3 * 7  # linear layers of tiny_llama's blocks


@pytest.fixture(scope="module")
def made() -> dict[str, nn.Module]:
    return variants(tiny_llama(), {"LoRA": CONFIG, "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True)})


class Fake(nn.Module):
    """Takes note of what it is given, and takes as long as it is told."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, []

    @property
    def config(self):
        return self.model.config

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        self.calls.append((tuple(input_ids.shape), past, self.training, torch.is_grad_enabled()))
        return self.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)


def test_decode_reads_one_token_after_the_same_cache_each_time() -> None:
    fake = Fake(tiny_llama()).train()
    table = measure_latency({"x": fake}, batch_size=3, seq_len=11, rounds=2)
    assert fake.calls[0] == ((3, 11), 0, False, False)
    assert set(fake.calls[1:]) == {((3, 1), 11, False, False)}
    assert fake.training
    assert (table.phase, table.batch_size, table.seq_len) == ("decode", 3, 11)


def test_prefill_reads_all_tokens_without_a_cache() -> None:
    fake = Fake(tiny_gpt2())
    measure_latency({"x": fake}, phase="prefill", batch_size=2, seq_len=9, rounds=2)
    assert set(fake.calls) == {((2, 9), 0, False, False)}
    encoder = measure_latency({"x": tiny_bert()}, phase="prefill", seq_len=9, rounds=2)
    assert encoder.seconds["x"] > 0


def test_figures_by_variant(made) -> None:
    table = measure_latency(made, seq_len=8, rounds=3, reference="LoRA")
    assert list(table.seconds) == list(table.ratios) == list(table.spread) == list(made)
    assert table.ratios["LoRA"] == 1.0
    assert table.spread["LoRA"] == (1.0, 1.0)
    assert all(1e-5 < s < 1 for s in table.seconds.values())
    assert all(low <= table.ratios[n] <= high for n, (low, high) in table.spread.items())
    assert table.launches == {}


def test_ratios_are_those_of_the_times(made, monkeypatch) -> None:
    times = {"base": [0.1, 0.2], "LoRA": [0.12, 0.26]}
    monkeypatch.setattr(lora_nb.latency, "interleaved", lambda *_, **__: Times(times))
    table = measure_latency({n: made[n] for n in times}, seq_len=8)
    assert table.seconds == {"base": pytest.approx(0.15), "LoRA": pytest.approx(0.19)}
    assert table.ratios["LoRA"] == pytest.approx(1.25)  # of 1.2 and 1.3
    assert "1.250" in repr(table)
    assert "over base" in table._repr_html_()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_operations_and_flops_are_counted(made, phase) -> None:
    table = measure_latency(made, phase=phase, batch_size=2, seq_len=10, rounds=1)
    tokens = 2 * (10 if phase == "prefill" else 1)
    assert table.operations["LoRA"] - table.operations["base"] == 2 * LAYERS  # mm and addmm_
    for name in ("LoRA, merged", "DoRA, merged"):
        assert table.operations[name] == table.operations["base"]
        assert table.flops[name] == table.flops["base"]
    # Σ r · (in + out), two FLOPs each: q and o 32 + 32, k and v 32 + 16, gate, up and down 32 + 48.
    extra = 2 * tokens * 4 * 3 * (2 * 64 + 2 * 48 + 3 * 80)
    assert table.flops["LoRA"] - table.flops["base"] == extra
    assert table.operations["DoRA"] > table.operations["LoRA"]


def table(batch: int, ratio: float, length: int = 64) -> LatencyTable:
    figures = {"base": 1.0, "x": ratio}
    return LatencyTable("decode", batch, length, "base", figures, figures, {n: (v, v) for n, v in figures.items()}, {}, {}, {})


def test_from_which_batch_size_on_a_variant_is_free() -> None:
    falling = [table(1, 1.3), table(2, 1.02), table(4, 1.1), table(8, 1.01), table(16, 0.99)]
    assert LatencySweep(tuple(falling)).free_from("x") == {64: 8}  # 2 is within, but 4 is not
    assert LatencySweep(tuple(falling[:3])).free_from("x") == {64: None}
    assert LatencySweep((*falling, table(1, 1.0, 128))).free_from("x") == {64: 8, 128: 1}
    assert LatencySweep(tuple(falling)).free_from("x", within=1.2) == {64: 2}
    with pytest.raises(LatencyError, match="Did you mean 'base'"):
        LatencySweep(tuple(falling)).free_from("bas")


def test_a_sweep_covers_all_sizes(made) -> None:
    sweep = sweep_latency({"base": made["base"]}, batch_sizes=(1, 2), seq_lens=(4, 8), rounds=1, phase="prefill")
    assert [(t.batch_size, t.seq_len) for t in sweep.tables] == [(1, 4), (2, 4), (1, 8), (2, 8)]
    assert sweep.tables[3].flops["base"] > 3.5 * sweep.tables[0].flops["base"]
    assert repr(sweep).count("1.000 (1.000 to 1.000)") == 4
    assert "prefill" in sweep._repr_html_()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variants": {}}, "at least one"),
        ({"variants": None}, "a dict of name to model"),
        ({"phase": "decoding"}, "Did you mean 'decode'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": -5}, "seq_len=-5"),
        ({"seq_len": 2.5}, "seq_len=2.5"),
        ({"rounds": True}, "rounds=True"),
        ({"seq_len": 64}, "at most 64 tokens"),
        ({"seq_len": 65, "phase": "prefill"}, "at most 64 tokens"),
        ({"reference": "LoRa"}, "Did you mean 'LoRA'"),
        ({"variants": {"x": nn.Linear(3, 2)}}, "'x' is a Linear, not a language model"),
        ({"variants": {"x": "gpt2"}}, "'x' is a str"),
        ({"variants": {"x": tiny_bert()}, "seq_len": 9}, "phase='prefill'"),
    ],
)
def test_what_cannot_be_measured_is_refused(made, settings, says) -> None:
    with pytest.raises(LatencyError, match=says):
        measure_latency(**({"variants": made, "seq_len": 8, "rounds": 1} | settings))


def test_a_sweep_is_refused_before_anything_is_measured(made, monkeypatch) -> None:
    monkeypatch.setattr(lora_nb.latency, "measure_latency", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(LatencyError, match="at most 64"):
        sweep_latency(made, seq_lens=(8, 640))
    with pytest.raises(LatencyError, match="at least one batch size"):
        sweep_latency(made, batch_sizes=())


@pytest.mark.gpu
def test_kernels_are_counted_on_a_gpu(made) -> None:
    on_gpu = variants(tiny_llama().cuda(), {"LoRA": CONFIG})
    counted = measure_latency(on_gpu, seq_len=8, rounds=3)
    assert counted.launches["LoRA"] > counted.launches["base"] > 0
    assert "kernels" in repr(counted)
    with pytest.raises(LatencyError, match="different devices"):
        measure_latency({"a": made["base"], "b": on_gpu["base"]}, seq_len=8)
