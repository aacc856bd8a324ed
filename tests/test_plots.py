"""What the figures show: their numbers, not their looks."""

import pytest

from lora_nb import plots
from lora_nb.configs import LoraConfig
from lora_nb.latency import LatencySweep, LatencyTable
from lora_nb.memory.estimate import estimate
from lora_nb.rank.choice import Score
from lora_nb.rank.report import RankReport

LORA = LoraConfig(r=4, lora_alpha=12)


def table(batch: int = 1, length: int = 64) -> LatencyTable:
    ratios = {"base": 1.0, "LoRA": 1.25 / batch + 0.5, "LoRA, merged": 1.01}
    spread = {name: (r - 0.05, r + 0.05) for name, r in ratios.items()}
    return LatencyTable("decode", batch, length, "base", dict.fromkeys(ratios, 0.01), ratios, spread, {}, {}, {})


def report() -> RankReport:
    scores = {1: Score(2.5, 0.5, 0.02), 4: Score(2.005, 0.005, 0.001), 8: Score(2.0, 0.0, 0.0)}
    ranks = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 6, "model.layers.1.mlp.up_proj": 4, "lm_head": 1}
    return RankReport("tone", 4, (3, 6), scores, ranks, 0.25, 2.004, 0.005, 40, 1.0, 0.03, {}, 3.0)


def words(figure) -> str:
    drawn = [
        t.get_text() for axes in figure.axes for t in (*axes.texts, axes.xaxis.label, *axes.get_yticklabels(), *axes.get_xticklabels())
    ]
    legends = [t.get_text() for axes in figure.axes if axes.get_legend() for t in axes.get_legend().get_texts()]
    return "\n".join([*drawn, *legends, *(axes.get_title(loc="left") for axes in figure.axes)])


def test_latency_ratios_are_bars_with_their_spread() -> None:
    figure = plots.latency_ratios(table())
    bars = [p.get_width() for p in figure.axes[0].patches]
    assert bars == [1.0, 1.75, 1.01]
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines[:2]] == [[0.95, 1.05], [1.7, 1.8]]
    assert "1.75" in words(figure)
    assert "one more token after 64 tokens" in words(figure)


def test_a_sweep_has_a_panel_for_each_length_and_a_line_for_each_variant() -> None:
    figure = plots.latency_by_batch(LatencySweep(tuple(table(b, n) for n in (64, 128) for b in (4, 1, 2))))
    assert len(figure.axes) == 2
    lora, _ = figure.axes[0].lines
    assert lora.get_xdata().tolist() == [1, 2, 4]
    assert lora.get_ydata().tolist() == [1.75, 1.125, 0.8125]
    assert "LoRA, merged" in words(figure)


def test_the_choice_is_marked_on_the_losses() -> None:
    figure = plots.loss_by_rank(report())
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 4, 8]
    assert line.get_ydata().tolist() == [2.5, 2.005, 2.0]
    assert "chosen: 4" in words(figure)
    assert "cut to each rank: 4 is enough" in words(figure)


def test_ranks_lie_by_layer_and_kind() -> None:
    figure = plots.ranks_by_layer(report())
    placed = {(t.get_text(), *map(round, t.get_position())) for t in figure.axes[0].texts}
    assert placed == {("2", 1, 0), ("6", 2, 0), ("4", 2, 1), ("1", 0, 2)}
    assert "q_proj\nup_proj\nlm_head" in words(figure)
    assert "25% fewer parameters than rank 4 for all" in words(figure)


@pytest.mark.parametrize("figure", [plots.latency_ratios(table()), plots.loss_by_rank(report()), plots.ranks_by_layer(report())])
def test_they_are_drawn(figure, tmp_path) -> None:
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_memory_is_stacked_to_its_total_with_a_line_for_each_card() -> None:
    made = {"4 bits": estimate("gpt2", LORA, quant="nf4"), "16 bits": estimate("gpt2", LORA)}
    figure = plots.memory_bars(made, ["T4"])
    ends = [max(p.get_x() + p.get_width() for p in figure.axes[0].patches if round(p.get_y() + 0.4) == i) for i in range(2)]
    assert ends == pytest.approx([e.total / 2**30 for e in made.values()])
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [15360 / 1024]
    assert "T4" in words(figure)
    assert "4 bits" in words(figure)


def test_the_course_of_memory_is_as_high_as_its_peak_and_names_the_moments() -> None:
    found = estimate("gpt2", LORA)
    figure = plots.memory_course(found)
    top = max(point[1] for area in figure.axes[0].collections for path in area.get_paths() for point in path.vertices)
    assert top == pytest.approx(found.total / 2**30)
    assert "optimizer" in words(figure)
