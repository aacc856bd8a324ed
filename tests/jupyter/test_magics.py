"""`%lora` and `%%lora` in a real IPython shell: what they do, leave, say and offer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import lora_nb as ln
from lora_nb.errors import ConfigError
from lora_nb.jupyter.magics import examples, prompts


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    InteractiveShell.clear_instance()
    ip = InteractiveShell.instance()
    ip.history_manager.enabled = False
    ip.Completer.use_jedi = False
    ip.run_line_magic("load_ext", "lora_nb")
    yield ip
    ip.run_line_magic("unload_ext", "lora_nb")
    InteractiveShell.clear_instance()


def said(shell: InteractiveShell, line: str, cell: str | None = None) -> tuple[object, str]:
    with capture_output() as out:
        result = shell.run_line_magic("lora", line) if cell is None else shell.run_cell_magic("lora", line, cell)
    return result, out.stdout + "".join(str(o) for o in out.outputs)


def offers(shell: InteractiveShell, line: str) -> list[str]:
    with provisionalcompleter():
        return [c.text for c in shell.Completer.completions(line, len(line))]


def test_from_a_base_to_a_saved_adapter_and_its_answers(shell: InteractiveShell) -> None:
    _, out = said(shell, "load tiny")
    assert "5,803,264 parameters" in out
    assert "→ model, tokenizer" in out
    shell.user_ns["rank"] = 4
    report, out = said(shell, "attach --r $rank --target-modules q_proj,v_proj")
    assert report is shell.user_ns["report"]
    assert {m.rank for m in report.matched.values()} == {4}
    run, out = said(shell, "train --max-steps 2", "Could you please => Can you\nIt is => It's\n")
    assert run is shell.user_ns["run"]
    assert run.steps == 2
    assert "→ run" in out
    folder, _ = said(shell, "save saved/x")
    assert ln.inspect(folder).config.r == 4
    answers, _ = said(shell, "generate --pair --adapter default saved/x --max-new-tokens 3", "Could you\nIt is\n")
    assert list(answers.texts) == ["base", "default", "saved/x"]
    assert answers.texts["default"] == answers.texts["saved/x"]
    assert "Could you" in answers._repr_html_()
    report, _ = said(shell, "merge default")
    assert report.names == ("default",)


def test_the_notebooks_own_model_and_data_are_taken(shell: InteractiveShell) -> None:
    model, tokenizer = ln.load("tiny")
    shell.push({"model": model, "tokenizer": tokenizer, "mine": ln.dataset([("a", "b"), ("c", "d")])})
    run, out = said(shell, "train mine --max-steps 1 --r 2")
    assert run.adapter == "default"
    assert ln.parameters(model)
    assert "→ report, run" in out
    with pytest.raises(UsageError, match="your own variable `model`, and --base asks for 'tiny': `load tiny` first"):
        said(shell, "generate x --base tiny")


@pytest.mark.parametrize(
    ("line", "cell", "message"),
    [
        ("trian tone", None, "Did you mean 'train'"),
        ("attach --r 0", None, "r must be a whole number"),
        ("attach --r $k", None, "there is no variable 'k'"),
        ("attach --target-modules q_prj", None, "Did you mean 'q_proj'"),
        ("save x", None, "No model is loaded"),
        ("attach --method houlsby --r 3", None, "--r is LoRA's"),
        ("generate 'half", None, "quotation mark"),
        ("train", " \n ", "the cell is empty"),
        ("train tone", "a => b", "leave 'tone' out of the line"),
        ("train", "a => b\nc", "line 2 of the cell is 'c'"),
        ("train", '{"prompt": 1', "line 1 of the cell is not JSON"),
        ("attach", "text", "takes no cell"),
        ("show nothing_here", None, "is called 'nothing_here'"),
    ],
)
def test_a_wrong_line_gets_one_line(shell: InteractiveShell, line: str, cell: str | None, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        said(shell, line, cell)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_settings_for_a_new_adapter_beside_one_that_is_there_are_refused(shell: InteractiveShell) -> None:
    said(shell, "load")
    said(shell, "attach first --r 2")
    with pytest.raises(UsageError, match="--r would make a new adapter, but first is on the model"):
        said(shell, "train tone --r 4 --max-steps 1")


def test_help_is_printed_and_leaves_no_result(shell: InteractiveShell) -> None:
    result, out = said(shell, "attach --help")
    assert result is None
    assert "--lora-alpha" in out
    assert said(shell, "")[1].count("\n") > 8


def test_tab_offers_only_what_fits(shell: InteractiveShell) -> None:
    assert "train" in offers(shell, "%lora ")
    assert offers(shell, "%lora tra") == ["train"]
    assert offers(shell, "%lora attach --me") == ["--method"]
    assert offers(shell, "%lora attach --method h") == ["houlsby"]
    assert offers(shell, "%lora attach --zzz") == ["--zzz"]
    said(shell, "load")
    assert offers(shell, "%lora attach --target-modules q") == ["q_proj"]
    assert offers(shell, "%lora train to") == ["tone", "topics"]
    said(shell, "attach --r 2")
    said(shell, "save here/mine")
    assert offers(shell, "%lora inspect h") == ["here/mine"]
    assert "print" in offers(shell, "pri")


def test_a_cell_is_pairs_or_json_or_texts() -> None:
    assert [(p.prompt, p.completion) for p in examples("a b => c\n\nd=> e => f")] == [("a b", "c"), ("d", "e => f")]
    assert examples('{"text": "x"}\n{"text": "y"}') == [{"text": "x"}, {"text": "y"}]
    assert examples("one\ntwo\n\nthree") == ["one\ntwo", "three"]
    assert prompts(" a \n\nb") == ["a", "b"]
    with pytest.raises(ConfigError):
        prompts("\n")


def test_questions_are_answered_from_a_shape_and_from_the_model(shell: InteractiveShell) -> None:
    found, out = said(shell, "memory meta-llama/Llama-3.2-1B --r 8 --quant nf4")
    assert found.total == ln.estimate("meta-llama/Llama-3.2-1B", ln.LoraConfig(r=8, lora_alpha=16), quant="nf4").total
    assert "→ estimate" in out
    assert said(shell, "memory gpt2 --method generation")[0].total < said(shell, "memory gpt2 --method full")[0].total
    with pytest.raises(UsageError, match="full has none"):
        said(shell, "memory gpt2 --method full --r 4")
    table, _ = said(shell, "latency --rounds 1 --seq-len 4")
    assert {"base", "lora", "lora, merged", "dora", "houlsby"} <= set(table.seconds)


def test_answers_are_checked(shell: InteractiveShell) -> None:
    assert said(shell, "check 00.1 8,192")[0].passed
    shell.user_ns["mine"] = 3
    assert said(shell, "check 00.1 $mine")[0].passed is False
    assert said(shell, "check 00.1")[0].passed is None
    with pytest.raises(UsageError, match="no such exercise"):
        said(shell, "check 99.9 1")


def test_the_rank_is_found_from_the_last_run(shell: InteractiveShell) -> None:
    with pytest.raises(UsageError, match="There is no run"):
        said(shell, "rank")
    Path("pairs.jsonl").write_text("\n".join(f'{{"prompt": "number {i}", "completion": "{i} it is"}}' for i in range(120)))
    found, out = said(shell, "rank pairs.jsonl --r 2 --max-steps 2 --batch-size 4")
    assert 1 <= found.rank <= 2
    assert "run, ranks" in out
    assert said(shell, "rank")[0].rank == found.rank
